"""Medians, ratios and the table."""

from gemel.bench.report import Figure, join, table


def test_join_takes_median_and_range_and_keeps_figures_without_a_plan():
    figures = join([{"a_per_s": 3.0, "b": 1.0}, {"a_per_s": 9.0, "b": 1.0}, {"a_per_s": 4.0, "b": 1.0}], {"a_per_s": 8.0})
    assert figures == {"a_per_s": Figure(4.0, 3.0, 9.0, 8.0), "b": Figure(1.0, 1.0, 1.0, None)}
    assert figures["a_per_s"].as_json() == {"median": 4.0, "min": 3.0, "max": 9.0, "planned": 8.0, "ratio": 0.5}
    assert figures["b"].ratio is None


def test_a_plan_of_zero_has_no_ratio():
    assert Figure(2.0, 2.0, 2.0, 0.0).ratio is None


def test_table_shows_units_people_read():
    lines = table(
        {"output_tokens_per_s": Figure(1234.5, 1000.0, 1500.0, 2469.0), "ttft_p50_s": Figure(0.0125, 0.01, 0.02, None)}
    ).splitlines()
    assert lines[0].split() == ["figure", "measured", "min", "-", "max", "planned", "measured/planned"]
    assert lines[2].split() == ["output", "tokens/s", "1,234", "1,000", "-", "1,500", "2,469", "0.50"]
    assert lines[3].split() == ["ttft", "p50,", "ms", "12.5", "10", "-", "20", "-", "-"]
    assert len({len(line) for line in lines}) == 1
