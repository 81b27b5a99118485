"The command line: what ends on the user's terminal, and with which exit status"

import os
import subprocess
import sys
import warnings
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from rs_selfsup import cli
from rs_selfsup.modalities import DataError


def warns(_):
    warnings.warn("torch.jit.script is deprecated", FutureWarning, stacklevel=1)
    warnings.warn("half of the tiles are empty", UserWarning, stacklevel=1)


def fails(_):
    warns(_)
    raise DataError("there is no such store", fix="Build it.")


@pytest.mark.parametrize("call, status", [(warns, 0), (fails, 2)])
def test_future_warnings_stay_off_the_terminal(monkeypatch, capsys, call, status):
    monkeypatch.setattr(cli, "layered", lambda parser, argv: Namespace(call=call))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        before = list(warnings.filters), list(sys.warnoptions)
        assert cli.main([]) == status
        assert [w.category for w in seen] == [UserWarning]
        assert (warnings.filters, sys.warnoptions) == before  # as the caller had them
    assert ("there is no such store" in capsys.readouterr().err) == (status == 2)


def test_processes_of_a_command_keep_quiet_too(monkeypatch):
    options = []

    def call(_):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            options.extend(pool.submit(eval, "__import__('sys').warnoptions").result())

    monkeypatch.setattr(cli, "layered", lambda parser, argv: Namespace(call=call))
    assert cli.main([]) == 0
    assert "ignore::FutureWarning" in options


def test_data_error_in_a_process_of_its_own(tmp_path):
    "`pretrain` imports torchvision, which warns, before it finds that there is no store."
    argv = [sys.executable, "-m", "rs_selfsup.cli", "pretrain", "nowhere", "run"]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"}
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("rs-selfsup: ") and "nowhere" in done.stderr
    assert "FutureWarning" not in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", ["flags", "file"])
def test_variants_of_a_method_get_their_own_settings(monkeypatch, tmp_path, how):
    from rs_selfsup import compare

    seen = {}
    monkeypatch.setattr(compare, "made_store", lambda *a: seen.update(made=a))
    monkeypatch.setattr(compare, "compare", lambda store, out, methods, base, own, *a: seen.update(methods=methods, base=base, own=own) or stop())
    argv = ["compare", "store", str(tmp_path)]
    if how == "flags":
        argv += ["--methods", "full=cmid", "mssdf", "--set", "embed_dim=96", "full.weights.rec=0", "full.block=16", "--each"]
        argv += ["--scenes", "a.yaml", "--tiles", "tile=32"]
    else:
        file = tmp_path / "c.toml"
        file.write_text('methods = ["full=cmid", "mssdf"]\neach = true\nscenes = "a.yaml"\n[tiles]\ntile = 32\n'
                        '[settings]\nembed_dim = 96\n[settings.full]\n"weights.rec" = 0\nblock = 16\n')
        argv += ["--config", str(file)]
    assert cli.main(argv) == 2
    assert seen["made"] == (Path("store"), "a.yaml", dict(tile=32))
    assert seen["methods"] == dict(full="cmid", mssdf="mssdf") and seen["base"].each
    assert seen["base"].settings == dict(embed_dim=96) and seen["own"] == dict(full={"weights.rec": 0, "block": 16}, mssdf={})


def stop():
    raise DataError("seen enough", fix="Nothing.")


@pytest.mark.parametrize("text", ["mae", "full=mae", "=cmid", ""])
def test_a_variant_names_a_method(text, capsys, tmp_path):
    assert cli.main(["compare", "store", str(tmp_path), "--methods", text]) == 2
    assert "NAME=METHOD" in capsys.readouterr().err


def test_help_names_a_default_once():
    commands = cli.build_parser()._subparsers._group_actions[0].choices
    text = "\n".join(p.format_help() for p in commands.values())
    assert "(default: None)" not in text and "(default: 224)" in text and "(default: the tile)" in " ".join(text.split())


@pytest.mark.parametrize("argv, reader, status", [("data list", "true", "141"), ("data show potsdam", "head -1", "0 141"), ("--help", "true", "0 141")])
def test_a_reader_that_leaves(argv, reader, status):
    "`rs-selfsup data list | head`: no traceback, whether the pipe breaks in the middle or at the very end"
    line = f"{sys.executable} -m rs_selfsup.cli {argv} | {reader} > /dev/null; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=600)
    assert done.stderr == "" and done.stdout.strip() in status.split()


def test_another_pipe_that_breaks_is_not_hidden(monkeypatch):
    def call(_):
        raise BrokenPipeError("a worker is gone")

    monkeypatch.setattr(cli, "layered", lambda parser, argv: Namespace(call=call))
    with pytest.raises(BrokenPipeError, match="a worker is gone"):
        cli.main([])
