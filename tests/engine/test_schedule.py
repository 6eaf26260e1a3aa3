"""One scenario for each rule of the scheduler. Blocks hold 4 tokens unless a test says otherwise."""

import re

import pytest

from gemel.config import CapacityError, RequestError
from gemel.engine.request import Sequence, Status, StepPlan
from tests.engine.simulation import Simulation


def shares(plan: StepPlan) -> list[tuple[int, int, int, bool]]:
    """(arrival, start, tokens, samples) of each sequence in a plan."""
    return [(item.sequence.arrival, item.start, item.num_new, item.samples) for item in plan.work]


def test_a_prompt_is_computed_in_chunks_under_the_budget():
    sim = Simulation(max_step_tokens=8)
    sequence = sim.add(list(range(20)), 3)
    assert shares(sim.step()) == [(0, 0, 8, False)]
    assert len(sequence.blocks) == 2  # blocks come with the tokens, not with the request
    assert shares(sim.step()) == [(0, 8, 8, False)]
    assert shares(sim.step()) == [(0, 16, 4, True)]
    assert shares(sim.step()) == [(0, 20, 1, True)]
    assert shares(sim.step()) == [(0, 21, 1, True)]
    assert sequence.status is Status.FINISHED and sim.pool.num_used == 0
    assert not sim.step().work


def test_prompts_share_what_the_budget_leaves():
    sim = Simulation(max_step_tokens=8)
    for start in range(3):
        sim.add([start] * 6, 2)
    assert shares(sim.step()) == [(0, 0, 6, True), (1, 0, 2, False)]
    assert shares(sim.step()) == [(0, 6, 1, True), (1, 2, 4, True), (2, 0, 3, False)]


def test_decoding_never_waits_for_a_prompt_not_even_an_urgent_one():
    sim = Simulation(max_step_tokens=5)
    for _ in range(2):
        sim.add([1, 2], 20)
    sim.step()
    sim.add(list(range(30)), 2, priority=-1)
    for step in range(10):
        assert shares(sim.step())[0] == (2, 3 * step, 3, step == 9)
    assert all(len(sequence.tokens) == 2 + 11 for sequence in sim.scheduler.running[1:])


def test_waiting_is_ordered_by_priority_then_arrival():
    sim = Simulation(max_running=1)
    for priority in (1, 0, 1, -5, 0):
        sim.add([1], 2, priority=priority)
    order = []
    while sim.scheduler.has_work:
        order += [arrival for arrival, start, _, _ in shares(sim.step()) if start == 0]
    assert order == [3, 1, 4, 0, 2]


def test_a_prefix_hit_is_progress():
    sim = Simulation(num_blocks=20)
    prompt = list(range(18))
    sim.add(prompt, 2)
    sim.run()
    second = sim.add(prompt, 2)
    assert shares(sim.step()) == [(1, 16, 2, True)]
    assert second.cached_tokens == 16
    assert sim.pool.prefix_hit_tokens == 16
    assert sim.pool.prefix_misses == {"cold": 16, "evicted": 0, "partial": 4, "off": 0}


def test_outputs_are_found_as_prefixes_too():
    sim = Simulation(token=lambda sequence: 7)
    sim.add([1, 2, 3], 10)
    sim.run()
    turn = sim.add([1, 2, 3, *[7] * 10, 8, 8], 2)
    sim.step()
    assert turn.cached_tokens == 12


def test_nothing_is_shared_across_salts():
    sim = Simulation()
    sim.add(list(range(9)), 2, salt="a")
    sim.run()
    other = sim.add(list(range(9)), 2, salt="b")
    sim.run()
    assert other.cached_tokens == 0


def test_a_running_prefix_is_shared_and_outlives_its_owner():
    sim = Simulation(num_blocks=8)
    prompt = list(range(12))
    first = sim.add(prompt, 3)
    sim.step()
    second = sim.add(prompt, 9)
    sim.step()
    assert second.blocks[:2] == first.blocks[:2] and second.cached_tokens == 8
    sim.run()


def test_the_least_urgent_makes_room_and_finds_its_work_again():
    sim = Simulation(num_blocks=6, token=lambda sequence: 7)
    first, second = sim.add(list(range(8)), 12), sim.add(list(range(50, 58)), 6)
    plans = []
    while first.status is not Status.FINISHED:
        plans.append(sim.step())
    victims = [victim for plan in plans for victim in plan.preempted]
    assert victims == [second] and second.num_preemptions == sim.scheduler.num_preemptions == 1
    hits = sim.pool.prefix_hit_tokens
    plan = sim.step()
    assert plan.work[0].sequence is second and plan.work[0].start >= 4  # part of it was still cached
    assert sim.pool.prefix_hit_tokens == hits and second.cached_tokens == 0  # counted at the first admission only
    sim.run()
    assert len(second.tokens) == 14


def test_a_preempted_sequence_goes_before_those_that_came_after_it():
    sim = Simulation(num_blocks=6)
    first, second = sim.add([1] * 8, 12), sim.add([2] * 8, 6)
    third = sim.add([3] * 12, 6)
    while not second.num_preemptions:
        sim.step()
    assert sim.scheduler.waiting == [second, third]
    assert first.status is Status.RUNNING


def test_the_least_urgent_itself_stalls_and_keeps_what_it_has():
    sim = Simulation(num_blocks=7)
    sim.add([1] * 11, 12)
    second = sim.add([2] * 10, 12)
    sim.step(), sim.step()
    assert len(sim.step().work) == 2 and sim.pool.num_free == 0  # the first has just taken the last block
    for _ in range(3):  # the second cannot go on, but nobody needs what it has
        plan = sim.step()
        assert len(plan.work) == 1 and not plan.preempted and len(second.blocks) == 3
    assert sim.step().preempted == (second,)  # now the first needs one more
    sim.run()


def test_a_lone_sequence_may_fill_the_pool_to_the_last_slot():
    sim = Simulation(num_blocks=4, max_context=16)
    sequence = sim.add([1] * 3, 13)
    sim.run()
    assert len(sequence.tokens) == 16 and sequence.num_preemptions == 0


def test_admission_leaves_room_for_those_that_run():
    """The second prompt would fit into the free blocks, but only by preempting the first at its next block."""
    sim = Simulation(num_blocks=6)
    sim.add([1] * 11, 8)
    sim.step()
    second = sim.add([2] * 12, 2)
    sim.step()
    assert second.status is Status.WAITING
    sim.run()
    assert sim.scheduler.num_preemptions == 0


def test_admission_counts_what_running_prompts_still_need():
    sim = Simulation(num_blocks=8, max_step_tokens=8)
    sim.add([1] * 20, 3)
    second = sim.add([2] * 12, 3)
    sim.step(), sim.step(), sim.step()
    assert second.status is Status.WAITING and sim.scheduler.num_preemptions == 0
    sim.run()
    assert sim.scheduler.num_preemptions == 0


def test_cached_blocks_of_the_newcomer_are_not_free_for_it_as_well():
    sim = Simulation(num_blocks=6)
    sim.add(list(range(9)), 1)
    sim.run()
    sim.add([50] * 9, 5)
    sim.step()
    newcomer = sim.add([*range(8), 8, 8, 8, 8, 8, 8], 3)  # 2 cached blocks and 2 more, where 1 is free besides those 2
    sim.step()
    assert newcomer.status is Status.WAITING
    sim.run()
    assert newcomer.cached_tokens == 8 and sim.scheduler.num_preemptions == 0


def test_many_that_compute_the_same_prompt_at_once_stay_correct():
    sim = Simulation(num_blocks=16)
    for _ in range(3):
        sim.add(list(range(10)), 5)
    assert len(sim.step().work) == 3
    sim.run()
    later = sim.add(list(range(10)), 2)
    sim.step()
    assert later.cached_tokens == 8


# Priorities


def test_a_higher_priority_takes_a_running_slot():
    sim = Simulation(max_running=2)
    low = [sim.add([1, 2], 9, priority=1) for _ in range(2)]
    sim.step()
    urgent = sim.add([3, 4], 2, priority=0)
    plan = sim.step()
    assert plan.preempted == (low[1],) and sim.scheduler.running == [urgent, low[0]]


def test_a_higher_priority_does_not_wait_for_a_long_prompt_to_end():
    sim = Simulation(num_blocks=20, max_step_tokens=8)
    sim.add([1] * 40, 2, priority=1)
    sim.step()
    sim.add([2] * 6, 2, priority=0)
    assert shares(sim.step()) == [(1, 0, 6, True), (0, 8, 2, False)]


def test_an_equal_priority_takes_nothing():
    sim = Simulation(max_running=1)
    sim.add([1, 2], 4)
    sim.step()
    sim.add([3, 4], 2)
    assert not sim.step().preempted
    sim.run()
    assert sim.scheduler.num_preemptions == 0


def test_a_higher_priority_takes_blocks_but_no_more_than_it_needs():
    sim = Simulation(num_blocks=9)
    low = [sim.add([start] * 9, 3, priority=1) for start in range(2)]
    sim.step()
    urgent = sim.add([9] * 15, 2, priority=0)
    plan = sim.step()
    assert plan.preempted == (low[1],) and urgent.status is Status.RUNNING and low[0].status is Status.RUNNING


def test_blocks_promised_to_a_victim_count_as_gain():
    sim = Simulation(num_blocks=9, max_step_tokens=8)
    sim.add([1, 2], 5, priority=1)
    low = sim.add([1] * 20, 3, priority=1)
    sim.step()
    assert len(low.blocks) == 2  # of the 5 that its prompt needs
    sim.add([2] * 19, 2, priority=0)
    assert sim.step().preempted == (low,)


def test_nobody_is_preempted_in_vain():
    sim = Simulation(num_blocks=8)
    sim.add([1] * 16, 4, priority=0)
    low = sim.add([2] * 6, 6, priority=5)
    sim.step()
    sim.add([3] * 24, 4, priority=0)  # needs 6 blocks: preempting the low priority gives 2 and the 4 others are out of reach
    sim.step()
    assert low.num_preemptions == 0
    sim.run()


def test_blocks_that_the_urgent_one_wants_to_reuse_are_not_counted_as_gain():
    sim = Simulation(num_blocks=10)
    other, owner = sim.add([7] * 11, 9, priority=1), sim.add(list(range(11)), 9, priority=1)
    sim.step()
    urgent = sim.add([*range(8), *range(50, 70)], 2, priority=0)  # 7 blocks: 2 of the owner's, 4 free, and the owner has only 1 more
    assert sim.step().preempted == (owner, other)
    assert urgent.cached_tokens == 8 and urgent.num_computed == 28
    sim.run()


def test_after_a_preemption_nobody_less_urgent_slips_in():
    sim = Simulation(num_blocks=8)
    victim = sim.add([1] * 19, 9, priority=1)
    sim.step()
    sim.add([2] * 15, 3, priority=0)
    last = sim.add([3], 3, priority=2)  # would fit beside the urgent one, which the victim does not
    assert sim.step().preempted == (victim,)
    assert sim.scheduler.waiting == [victim, last]
    sim.run()


# Refusals


def way_out(error: pytest.ExceptionInfo[RequestError]) -> int:
    """The number that the message proposes."""
    found = re.search(r"(?:lower max_tokens to|shorten the prompt by|shorten the prompt to) (\d+)", str(error.value))
    assert found, str(error.value)
    return int(found.group(1))


def test_an_empty_prompt_is_refused():
    with pytest.raises(RequestError, match="0 tokens") as error:
        Simulation().add([])
    assert error.value.param == "prompt"


def test_a_prompt_that_fills_the_context_is_refused():
    sim = Simulation(max_context=10)
    sequence = sim.sequence([1] * 9, 1)
    sequence.tokens.append(1)
    with pytest.raises(RequestError, match="10 tokens and the context is 10") as error:
        sim.scheduler.add(sequence)
    assert error.value.param == "prompt" and way_out(error) == 9
    sim.add([1] * 9, 1)
    sim.run()


def test_what_can_never_fit_is_refused_and_the_way_out_works():
    sim = Simulation(num_blocks=5)
    with pytest.raises(RequestError, match="need 6 blocks of 4 tokens, all there are is 5") as error:
        sim.add([1] * 10, 11)
    assert error.value.param == "max_tokens"
    sim.add([1] * 10, way_out(error))
    sim.run()


def test_a_prompt_that_can_never_fit_is_refused_and_the_way_out_works():
    sim = Simulation(num_blocks=5)
    with pytest.raises(RequestError, match="need 6 blocks") as error:
        sim.add([1] * 22, 2)
    assert error.value.param == "prompt"
    sim.add([1] * (22 - way_out(error)), 1)
    sim.run()


def test_beams_must_fit_together():
    sim = Simulation(num_blocks=8)
    with pytest.raises(RequestError, match=r"each of 3 beams need 9 blocks .* 8: lower max_tokens to 3, use fewer beams") as error:
        sim.add([1] * 5, 7, beam_width=3)
    sim.add([1] * 5, way_out(error), beam_width=3)
    sim.add([1] * 5, 7, beam_width=2)
    sim.add([1] * 5, 7, n=3)  # samples need not run at the same time


@pytest.mark.parametrize("width", [{"n": 3}, {"beam_width": 3}])
def test_more_sequences_than_slots_are_refused(width):
    sim = Simulation(max_running=2)
    with pytest.raises(RequestError, match="= 3 is more than max_running = 2") as error:
        sim.add([1], 2, **width)
    assert error.value.param in width


def test_a_refused_request_leaves_no_trace():
    sim = Simulation(num_blocks=4, max_running=2)
    for prompt, new, n in (([], 1, 1), ([1] * 30, 3, 1), ([1], 2, 3)):
        with pytest.raises(RequestError):
            sim.add(prompt, new, n=n)
    assert not sim.scheduler.has_work
    sim.check()


def test_a_full_queue_refuses_until_there_is_room():
    sim = Simulation(max_running=2, max_waiting=1)
    for _ in range(3):  # two for the free slots, one to wait
        sim.add([1], 3)
    with pytest.raises(CapacityError, match="1"):
        sim.add([1], 3)
    sim.step()
    with pytest.raises(CapacityError, match="1 requests are waiting and max_waiting = 1"):
        sim.add([1], 3)
    sim.step(), sim.step(), sim.step()
    sim.add([1], 3)


def test_no_queue_at_all_still_serves_what_can_start_at_once():
    sim = Simulation(max_running=1, max_waiting=0)
    sim.add([1], 2)
    sim.step()
    with pytest.raises(CapacityError):
        sim.add([1], 2)
    sim.step()
    sim.add([1], 2)


def test_preempted_sequences_do_not_count_as_waiting():
    sim = Simulation(num_blocks=6, max_waiting=1, max_running=2)
    sim.add([1] * 8, 12)
    second = sim.add([2] * 8, 6)
    while not second.num_preemptions:
        sim.step()
    sim.add([3], 2)
    sim.add([3], 2)  # the preempted one has left a slot
    with pytest.raises(CapacityError):
        sim.add([3], 2)


# Siblings


def test_a_fork_shares_blocks_until_one_writes():
    sim = Simulation(token=lambda sequence: sequence.index)
    sim.add([1, 2, 3, 4, 5], 1)
    sim.run()
    parent = sim.add([1, 2, 3, 4, 5], 6, n=2)
    sim.step()
    child = sim.fork(parent, 1)
    assert child.cached_tokens == parent.cached_tokens == 4
    assert child.blocks == parent.blocks and sim.pool.num_used == 2 and child.num_computed == 5
    child.tokens[-1] = 77
    plan = sim.step()
    assert plan.copies == ((child.blocks[1], parent.blocks[1]),)  # the first to write moves away, the other stays alone
    assert child.blocks[0] == parent.blocks[0] and sim.pool.num_used == 3
    assert not sim.step().copies
    sim.run()


def test_a_fork_at_a_block_boundary_copies_nothing():
    sim = Simulation()
    parent = sim.add([1, 2, 3, 4], 6, n=2)
    sim.step()
    child = sim.fork(parent, 1)
    assert not sim.step().copies
    assert child.blocks[0] == parent.blocks[0] and child.blocks[1] != parent.blocks[1]
    sim.run()


def test_three_forks_of_a_partial_block_copy_it_twice():
    sim = Simulation()
    parent = sim.add([1, 2, 3], 4, n=3)
    sim.step()
    sim.fork(parent, 1), sim.fork(parent, 2)
    plan = sim.step()
    assert len(plan.copies) == 2 and len({source for source, _ in plan.copies}) == 1
    sim.run()


def test_a_fork_that_cannot_be_copied_gives_way():
    sim = Simulation(num_blocks=1, token=lambda sequence: sequence.index)
    parent = sim.add([1, 2], 2, n=2)
    sim.step()
    child = sim.fork(parent, 1)
    plan = sim.step()
    assert plan.preempted == (child,) and not plan.copies
    sim.run()


def test_a_request_holds_a_slot_for_every_sample_to_come():
    sim = Simulation(max_running=4)
    parent = sim.add([1], 4, n=3)
    other = sim.add([2], 9, n=2)
    sim.step()
    assert other.status is Status.WAITING
    children = [sim.fork(parent, 1), sim.fork(parent, 2)]
    sim.scheduler.finish(children[0])
    sim.step()
    assert other.status is Status.RUNNING  # two samples are left, so two slots are free


def test_beams_keep_their_slots():
    sim = Simulation(max_running=3)
    parent = sim.add([1], 4, beam_width=2)
    other = sim.add([2], 9, n=2)
    sim.step()
    child = sim.fork(parent, 1)
    sim.scheduler.finish(child)
    sim.step()
    assert other.status is Status.WAITING


def test_a_preempted_sample_comes_back_into_its_requests_slots():
    sim = Simulation(num_blocks=3, max_running=2, token=lambda sequence: sequence.index)
    parent = sim.add([1, 2, 3, 4], 8, n=2)
    sim.step()
    child = sim.fork(parent, 1)
    sim.run()
    assert child.num_preemptions > 0
    assert len(parent.tokens) == len(child.tokens) == 12


def test_held_beams_keep_their_blocks_and_get_no_work():
    sim = Simulation()
    parent = sim.add([1, 2, 3], 6, beam_width=2)
    plan = sim.scheduler.schedule(0.0)
    sim.scheduler.commit(plan)  # it has sampled, and the engine does not append yet
    assert not sim.scheduler.schedule(0.0).work
    assert parent.num_computed == 3 and len(parent.blocks) == 1
    sim.scheduler.check()


def test_held_beams_of_two_requests_do_not_block_each_other():
    """Each request has one beam that waits for its sibling and one that waits for blocks: the less urgent request has to give way."""
    sim = Simulation(num_blocks=4, max_running=4)
    pairs = []
    for start in range(2):
        parent = sim.add([start] * 4, 4, beam_width=2)
        sim.scheduler.commit(sim.scheduler.schedule(0.0))
        pairs.append((parent, sim.fork(parent, 1)))
        sim.scheduler.finish(parent)
    # one live beam per request is computed; give each a sibling that has to compute everything
    for parent, child in pairs:
        sibling = Sequence(parent.request, 2, parent.arrival, [9, 9, 9, 9, 9, 9], parent.max_total)
        sim.scheduler.add(sibling)
        child.tokens[:] = child.tokens[:4]
    plan = sim.scheduler.schedule(0.0)
    assert plan.work and plan.work[0].sequence.arrival == 0


# Ends


def test_a_sequence_may_end_in_any_state_and_twice():
    sim = Simulation(max_running=1)
    first, second = sim.add([1] * 5, 4), sim.add([2] * 5, 4)
    sim.step()
    for sequence in (second, first):
        sim.scheduler.abort(sequence)
        sim.scheduler.abort(sequence)
        sim.scheduler.finish(sequence)
        assert sequence.status is Status.FINISHED and not sequence.blocks
    assert not sim.scheduler.has_work and sim.pool.num_used == 0
    sim.check()


def test_an_abort_during_the_step_wins_over_its_commit():
    sim = Simulation()
    first, second = sim.add([1] * 8, 4), sim.add([2] * 8, 4)
    sim.step(before_commit=lambda plan: sim.scheduler.abort(first))
    assert first.num_computed == 0 and second.num_computed == 8
    assert sim.add([1] * 9, 2) and sim.step().work[-1].start == 0  # nothing of the aborted one was published
    sim.run()


def test_a_step_that_failed_is_planned_again():
    sim = Simulation(max_step_tokens=8)
    sim.add(list(range(12)), 3)
    plan = sim.scheduler.schedule(0.0)
    assert sim.scheduler.schedule(0.0) == plan
    sim.run()


def test_new_weights_leave_nothing_to_read():
    sim = Simulation()
    sequence = sim.add(list(range(9)), 9)
    sim.add(list(range(50, 55)), 2)
    sim.step(), sim.step()
    sim.reset()
    assert sim.pool.num_used == sim.pool.num_cached == 0 and sequence.num_computed == 0
    assert sim.step().work[0].start == 0  # every old content would be noticed by the simulation
    sim.run()
    assert len(sequence.tokens) == 18


def test_a_large_prompt_is_not_starved_by_small_ones():
    sim = Simulation(num_blocks=8, max_running=3)
    for _ in range(3):
        sim.add([1] * 4, 6)
    large = sim.add([2] * 26, 4)
    for _ in range(60):
        if large.status is Status.FINISHED:
            break
        sim.add([1] * 4, 6)
        sim.step()
    assert large.status is Status.FINISHED


def test_equals_progress_equally():
    sim = Simulation(num_blocks=40, max_running=4)
    sequences = [sim.add([start] * 5, 20) for start in range(4)]
    for _ in range(15):
        sim.step()
        assert len({len(sequence.tokens) for sequence in sequences}) == 1
