"""The command line starts without torch, and ends cleanly after Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

import pruning
from pruning import cli
from pruning.cli.command_table import COMMANDS
from pruning.planning import scores
from pruning.planning.options import SCORES
from pruning.utils import lazy

pytestmark = pytest.mark.quick

#: Answers several command lines in one process, and prints the libraries that were imported for them.
ANSWERS = """
import contextlib, io, sys
from pruning import cli
from pruning.__main__ import main
for words in {words}:
    sys.argv = ["pruning", *words]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            cli.run(main)
        except SystemExit:
            pass
slow = ["torch", "torchvision", "numpy", "matplotlib", "onnx", "PIL", "jinja2", "thop"]
print([name for name in slow if name in sys.modules])
"""


def test_help_and_errors_of_usage_import_no_library():
    words = [[], ["--help"], *([name, "--help"] for name in COMMANDS)]
    words += [["slim", "--max-mcas", "3"], ["slim", "--weights", "absent.pth"], ["export", "absent.pth"]]
    code = ANSWERS.format(words=words)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_help_of_a_command_without_stages_names_none(capsys):
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            cli.main.parse([name, "--help"])
        titles = [
            line for line in capsys.readouterr().out.splitlines() if line.endswith(":") and line[0] != " "
        ]
        assert any("stage" in title for title in titles) == (name == "slim")


def test_every_public_name_is_found_when_it_is_first_used():
    for package in (pruning, pruning.planning, pruning.stages, pruning.training, pruning.deploy):
        imports = lazy._guarded_imports(package.__file__)
        assert sorted(imports) == sorted(package.__all__)
        for name in imports:
            assert getattr(package, name).__module__ == imports[name]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pruning.stages.nothing


def test_the_scores_of_flags_are_those_that_exist():
    assert tuple(scores.BY_NAME) == SCORES


@pytest.mark.parametrize("masked", [False, True])
def test_an_interrupt_ends_with_one_line_and_exit_code_130(masked, capsys):
    before = signal.getsignal(signal.SIGINT)

    def main():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            signal.raise_signal(signal.SIGINT)  # ignored
            if masked:  # as libraries do that are interrupted while they load
                raise ImportError("cannot be loaded") from None
            raise

    try:
        with pytest.raises(SystemExit) as end:
            cli.run(main, interrupted=lambda: "the advice")
    finally:
        signal.signal(signal.SIGINT, before)
    assert end.value.code == 130 and capsys.readouterr().err == "\nthe advice\n"


def test_only_a_run_that_exists_is_offered_to_go_on(tmp_path):
    from argparse import Namespace

    from pruning.__main__ import _Call

    call = _Call()
    assert call.advice() == "interrupted"
    call.args = Namespace(command="slim", resume=False, output=tmp_path)
    assert call.advice() == "interrupted"
    (tmp_path / "config.json").write_text("{}")
    assert call.advice().endswith(f"python -m pruning slim --resume --output {tmp_path}")
    call.args = Namespace(command="export", output=tmp_path)
    assert call.advice() == "interrupted"
    call.args = Namespace(command="frontier", output=tmp_path)
    assert call.advice() == "interrupted"
    (tmp_path / "frontier.json").touch()
    assert call.advice() == f"interrupted; the same command goes on from {tmp_path}"


def test_the_command_alone_shows_an_example_of_each_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("small.pth", "dense.pth"):
        (tmp_path / name).touch()
    with pytest.raises(SystemExit) as end:
        cli.main.parse([])
    shown = capsys.readouterr().out
    assert not end.value.code
    for name, command in COMMANDS.items():
        assert f"  {name}: {command.summary}\n    python -m pruning {name} {command.example}\n" in shown
        args, _ = cli.main.parse([name, *command.example.split()])
        assert args.command == name
