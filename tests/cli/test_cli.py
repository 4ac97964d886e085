"""The command line: what it prints, its exit codes, and that its options reach the library."""

import json
import re

import numpy as np
import pytest
import zarr
from distributed import LocalCluster
from small import SMALL

from oocattn.bench import Ceiling, Progress
from oocattn.cli import main as cli
from oocattn.cli.doctor import Check
from oocattn.problem_arguments import PROBLEM_OPTIONS


def test_from_synth_to_verify(dataset, result, capsys):
    options = ["--causal", "--host-memory", "64MiB", "--chunks", "7", "--dtype", "float16", "--scale", "0.5"]
    assert cli.main(["plan", dataset, *options]) == 0
    plan = capsys.readouterr().out
    assert "2 heads x 1,024 tokens x D = 16, float32 to float16, causal" in plan
    assert "c = 7" in plan
    assert "of 64 MiB" in plan
    assert cli.main(["status", result]) == 1
    assert capsys.readouterr().out.startswith("none")
    assert cli.main(["run", dataset, result, *options]) == 0
    printed = capsys.readouterr().out
    assert printed.index("problem ") < printed.index("14 subproblems on 1 lane")
    assert "nothing was run" not in printed
    assert cli.main(["status", result]) == 0
    assert capsys.readouterr().out.startswith("finished")
    assert cli.main(["verify", result, "--rows", "8"]) == 0
    assert capsys.readouterr().out.endswith("passed\n")
    out = zarr.open_group(result, mode="r")["out"]
    assert out.dtype == np.float16
    problem = zarr.open_group(result, mode="r").attrs["oocattn"]["problem"]
    assert (problem["scale"], problem["causal"]) == (0.5, True)


def test_a_finished_result_is_neither_run_again_nor_replaced_unasked(dataset, result, capsys):
    assert cli.main(["run", dataset, result, "--chunks", "1"]) == 0
    capsys.readouterr()
    assert cli.main(["run", dataset, result, "--chunks", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("nothing was run")
    assert cli.main(["run", dataset, result, "--chunks", "1", "--timeline", "t.json"]) == 0
    assert "nothing was run, and t.json not written" in capsys.readouterr().out
    assert cli.main(["run", dataset, result, "--chunks", "1", "--causal"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main(["run", dataset, result, "--chunks", "1", "--causal", "--overwrite"]) == 0


def test_options_of_synth_reach_the_dataset(tmp_path):
    path = str(tmp_path / "qkv.zarr")
    options = ["--kv-heads", "1", "--batch", "2", "--seed", "5", "--mean", "3"]
    assert cli.main(["synth", path, *SMALL, *options]) == 0
    group = zarr.open_group(path, mode="r")
    assert (group["q"].shape, group["k"].shape) == ((2, 2, 1024, 16), (2, 1, 1024, 16))
    assert np.mean(group["v"][:]) == pytest.approx(3, abs=0.1)
    assert group.attrs["oocattn"]["seed"] == 5
    assert cli.main(["synth", path, *SMALL]) == 1
    assert cli.main(["synth", path, *SMALL, "--overwrite"]) == 0
    assert zarr.open_group(path, mode="r")["q"].shape == (1, 2, 1024, 16)


def test_import_of_files_in_another_layout(tmp_path):
    arrays = {name: np.random.default_rng(i).standard_normal((20, 3, 8)) for i, name in enumerate("qkv")}
    files = []
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
        files += [f"--{name}", str(tmp_path / f"{name}.npy")]
    path = str(tmp_path / "qkv.zarr")
    assert cli.main(["import", path, *files, "--layout", "nhd", "--dtype", "float16"]) == 0
    group = zarr.open_group(path, mode="r")
    for name, array in arrays.items():
        np.testing.assert_array_equal(group[name][0], array.swapaxes(0, 1).astype(np.float16))


def test_names_are_printed_on_one_line_without_control_characters(tmp_path, capsys):
    name = str(tmp_path / "a\x1b[2J\nforged: line.zarr")
    assert cli.main(["plan", name]) == 1
    printed = capsys.readouterr().err
    assert "\x1b" not in printed
    assert len(printed.splitlines()) == 1
    with pytest.raises(SystemExit):
        cli.main(["plan", "x.zarr", name])
    assert r"a\x1b[2J\nforged: line.zarr" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["plan", "--draw", "{}"], ["run", "{result}", "--timeline", "{}"]])
def test_a_foreign_file_is_not_drawn_over(dataset, result, tmp_path, arguments, capsys):
    drawing = tmp_path / ("mine.svg" if "--draw" in arguments else "mine.json")
    drawing.write_text("mine")
    command, *options = (argument.format(drawing, result=result) for argument in arguments)
    assert cli.main([command, dataset, *options]) == 1
    assert f"{drawing} exists and was not written by oocattn" in capsys.readouterr().err
    assert drawing.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"qkv.zarr", drawing.name}


def test_plan_draws_the_division(dataset, tmp_path, capsys):
    drawing = tmp_path / "plan.svg"
    for _ in range(2):  # what it drew before is replaced
        assert cli.main(["plan", dataset, "--draw", str(drawing)]) == 0
    assert str(drawing) in capsys.readouterr().out
    assert drawing.read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "required: COMMAND"),
        (["plan"], "DATASET"),
        (["plan", "x.zarr", "--host-memory", "8 apples"], "'8 apples' is not understood: write it as"),
        (["plan", "x.zarr", "--chunks", "0"], "at least 1"),
        (["plan", "x.zarr", "--kernel", "magic"], "'magic'"),
        (["run", "x.zarr", "y.zarr", "--decomposition", "magic"], "'magic'"),
        (["run", "x.zarr", "y.zarr", "--scheduler", "tcp://a:1", "--dashboard", "a:2"], "not allowed with"),
        (["synth", "x.zarr", "--tokens", "1.5"], "whole number"),
        (["run", "x.zarr", "y.zarr", "--scheduler", "tcp://a:1", "--engine", "inline"], "leave one of both out"),
        (["resume", "y.zarr", "--dashboard", "a:2", "--engine", "inline"], "--engine inline with --dashboard: it runs on"),
        (["run", "--q=q", "--k=k", "--v=v", "x.zarr", "y.zarr"], "DATASET and --q --k --v are both given; name one"),
        (["plan", "--q=q", "--k=k", "--v=v", "x.zarr"], "x.zarr is not expected: DATASET and --q --k --v are both"),
        (["run", "--q=q", "--k=k", "y.zarr"], "the inputs have no --v: expected --q, --k and --v, or --qkv"),
        (["run", "--qkv=q", "--k=k", "y.zarr"], "the inputs have --qkv, and --k"),
        (["run", "--q=q", "--k=k", "--v=v", "y.zarr", "--qkv-heads", "2"], "--qkv-heads is given for q, k and v apart"),
        (["run", "x.zarr", "y.zarr", "--layout", "bnhd"], "--layout with a dataset"),
        (["resume", "y.zarr", "--dataset", "x", "--q=q", "--k=k", "--v=v"], "name either where the inputs are"),
        (["verify", "y.zarr", "--dataset", "s3://KEY:secret@bucket/x"], "--storage-option KEY=VALUE"),
        (["run", "x.zarr", "ftp://y"], "has the scheme 'ftp'"),
        (["status", "y.zarr", "--scratch", "z"], "y.zarr is a local path, and --scratch is given"),
        (["resume", "y.zarr", "--lock", "none"], "y.zarr is a local path, and --lock is given"),
        (["run", "x.zarr", "s3://y", "--scratch", "s3://z"], "scratch folder"),
        (["run", "x.zarr", "y.zarr", "--sink-tokens", "4"], "--sink-tokens 4 without a window"),
        (["plan", "x.zarr", "--prefix", "4"], "--prefix 4 where every row attends all keys"),
        (["plan", "x.zarr", "--chunks", "1M"], "whole number, 1 to"),
        (["plan", "x.zarr", "--draw", "x.png"], "ends in .svg"),
        (["run", "x.zarr", "y.zarr", "--timeline", "x.svg"], "ends in .json"),
    ],
)
def test_bad_usage_exits_with_2_and_says_why(arguments, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "nowhere.zarr"],
        ["verify", "nowhere.zarr"],
        ["run", "qkv.zarr", "out.zarr", "--host-memory", "1MiB"],
        ["plan", "qkv.zarr", "--chunks", "2K"],
        ["synth", "other.zarr", *SMALL, "--kv-heads", "3"],
        ["plan", "qkv.zarr", "--draw", "no-folder/plan.svg"],
        ["run", "qkv.zarr", "out.zarr", "--timeline", "no-folder/timeline.json"],
        ["bench", "--folder", "no-folder"],
    ],
)
def test_a_failure_is_one_line_and_exits_with_1(arguments, dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"qkv.zarr"}


def test_verify_finds_a_changed_row(dataset, result, capsys):
    assert cli.main(["run", dataset, result]) == 0
    zarr.open_group(result)["out"][0, :, -1, 0] += 1e-3  # the last token is always among the rows
    assert cli.main(["verify", result, "--rows", "4"]) == 1
    assert "FAILED: 1 of 4 rows" in capsys.readouterr().out


@pytest.mark.parametrize(("option", "shown"), [([], False), (["--progress"], True), (["--no-progress"], False)])
def test_progress_and_dashboard_appear_when_asked(option, shown, dataset, result, capsys):
    assert cli.main(["run", dataset, result, *option]) == 0
    captured = capsys.readouterr()
    assert ("dashboard http://127.0.0.1:" in captured.err) is shown
    assert ("subproblem" in captured.err) is shown


def test_the_timeline_of_a_run(dataset, result, tmp_path):
    assert cli.main(["run", dataset, result, "--timeline", str(tmp_path / "timeline.json")]) == 0
    events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    assert {"read", "compute", "merge", "write"} <= {event.get("cat") for event in events}
    assert "2 heads x 1,024 tokens" in (tmp_path / "timeline.svg").read_text()


def test_a_run_on_another_dask_cluster(dataset, result, capsys):
    with LocalCluster(n_workers=2, processes=True, dashboard_address=None, memory_limit=0) as cluster:
        assert cli.main(["run", dataset, result, "--scheduler", cluster.scheduler_address]) == 0
    assert "on 2 lanes" in capsys.readouterr().out
    assert cli.main(["verify", result, "--rows", "4"]) == 0


@pytest.mark.parametrize("command", ["synth", "import", "plan", "run", "resume", "status", "verify", "doctor", "bench"])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    options = re.split(r"^  (?=-)", capsys.readouterr().out.partition("options:")[2], flags=re.MULTILINE)[1:]
    assert len(options) > 0
    assert all(re.search(r"\s{2,}\S", option) for option in options), options  # an option, and then what it means


@pytest.mark.parametrize(("passed", "code", "word"), [(True, 0, "ok"), (False, 1, "FAILED")])
def test_doctor_exits_with_1_if_a_check_fails(passed, code, word, monkeypatch, capsys):
    monkeypatch.setattr(
        "oocattn.cli.doctor.examine", lambda: iter([Check("disk", passed, "as found"), Check("python", True, "3")])
    )
    assert cli.main(["doctor"]) == code
    assert capsys.readouterr().out.startswith(f"{word} ")


def test_bench_passes_its_options_on_and_prints_results_apart_from_progress(monkeypatch, capsys):
    asked = {}

    def fake(folder, **options):
        asked.update(options, folder=folder)
        yield Ceiling("disk", 2e9, "B/s")
        yield Progress("wrote the dataset", 1.5)

    monkeypatch.setattr("oocattn.bench.bench", fake)
    arguments = ["--tokens", "2K", "--heads", "4", "--kv-heads", "2", "--head-dim", "32", "--dtype", "float32", "--full"]
    arguments += ["--host-memory", "1GiB", "--device-memory", "1MiB", "--chunks", "7", "--decomposition", "cqs"]
    arguments += [
        "--kernel",
        "cpu",
        "--checkpoint-interval",
        "1m30s",
        "--folder",
        "/tmp",
        "--repeats",
        "5",
        "--rows",
        "9",
        "--seed",
        "3",
        "--precise",
        "--no-warm-up",
    ]
    assert cli.main(["bench", *arguments]) == 0
    left_out = {name: option.default for name, option in PROBLEM_OPTIONS.items() if name not in ("causal", "dtype")}
    del left_out["heads"], left_out["recorded"]  # those of the dataset
    assert asked == {
        **left_out, "keys": None, "value_dim": None,
        "tokens": 2048, "heads": 4, "kv_heads": 2, "head_dim": 32, "dtype": "float32", "causal": False,
        "host_memory": 1 << 30, "device_memory": 1 << 20, "chunks": 7, "decomposition": "cqs", "kernel": "cpu",
        "precise": True, "checkpoint_interval": 90.0, "folder": "/tmp", "repeats": 5, "rows": 9, "seed": 3, "warm_up": False,
    }  # fmt: skip
    captured = capsys.readouterr()
    assert captured.out.split() == ["disk", "2", "GB/s"]
    assert captured.err == "wrote the dataset: 1.5 s\n"
