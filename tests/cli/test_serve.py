"""What `gemel serve` does before it serves: settings, address, and what it prints."""

from __future__ import annotations

import argparse
import socket
from pathlib import Path

import pytest

from gemel.cli import main as cli
from gemel.cli import model, serve
from gemel.config.errors import ConfigError
from gemel.config.server import ServerConfig
from gemel.engine.place import Derived


def test_port_that_is_taken_is_refused_before_loading_and_the_way_out_works(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "--model", str(tmp_path), "--port", str(port)]) == 2
        message = capsys.readouterr().err
        assert message == f"gemel: cannot listen on 127.0.0.1 port {port}: Address already in use; --port 0 takes a free one\n"
        assert serve.free_port(ServerConfig(port=0)) not in (0, port)


def test_free_port_is_kept() -> None:
    port = serve.free_port(ServerConfig(port=0))
    assert serve.free_port(ServerConfig(port=port)) == port


def test_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1 .*give another --host"):
        serve.free_port(ServerConfig(host="192.0.2.1", port=0))


def test_banner_says_what_was_derived_and_gives_a_request_that_names_the_address() -> None:
    text = serve.banner("tiny", ServerConfig(port=8001), [Derived("dtype", "float32", "no bf16 here")])
    assert "model     tiny" in text
    assert "dtype     float32: no bf16 here" in text
    assert "curl http://127.0.0.1:8001/v1/chat/completions" in text
    assert "Bearer" not in text


def test_banner_of_a_guarded_server_shows_the_header_but_not_the_key() -> None:
    text = serve.banner("tiny", ServerConfig(host="0.0.0.0", api_key="hunter2"), [])
    assert "Authorization: Bearer YOUR_KEY" in text
    assert "hunter2" not in text
    assert "http://127.0.0.1:8000" in text


def test_ipv6_is_in_brackets() -> None:
    assert "http://[::1]:8000" in serve.banner("tiny", ServerConfig(host="::1"), [])


@pytest.mark.parametrize(("given", "name"), [("a/b/tiny", "tiny"), ("tiny.gguf", "tiny"), ("a-name", "a-name")])
def test_short_name(given: str, name: str) -> None:
    assert model.short_name(argparse.Namespace(model=given)) == name


def test_pull_of_a_path_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["serve", "--model", str(tmp_path), "--pull", "--port", "0"]) == 2
    assert "leave it out for a path" in capsys.readouterr().err


def test_bad_setting_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--port", "70000"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("gemel: ServerConfig.port = 70000")
    assert message.count("\n") == 1
