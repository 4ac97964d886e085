"""CUDA C++ is compiled without a GPU, kept on disk, and never taken from there when it is not what was kept."""

import shutil
from pathlib import Path

import pytest

pytest.importorskip("cuda.bindings.nvrtc", reason="it comes with torch's builds for CUDA")

from oocattn.kernels.cuda import program
from oocattn.kernels.cuda.program import CompilationError, Program

ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_100")


def merging(value_dim=64):
    return Program("merge.cu", {"VALUE_DIM": value_dim, "MOST_PIECES": 204, "MOST_SINKS": 512})


@pytest.fixture
def compiled(monkeypatch):
    """What was compiled, in order."""
    seen = []
    compile_ = Program._compile

    def note(self, options):
        seen.append(options)
        return compile_(self, options)

    monkeypatch.setattr(Program, "_compile", note)
    return seen


@pytest.mark.parametrize(
    ("value_dim", "architecture"),
    [
        pytest.param(value_dim, architecture, marks=[] if (number + other) % 2 else pytest.mark.slow)
        for number, value_dim in enumerate((1, 40, 64, 256))
        for other, architecture in enumerate(ARCHITECTURES)
    ],
)
def test_merging_compiles_for_every_gpu(tmp_path, architecture, value_dim):
    binary = merging(value_dim).build(architecture, tmp_path)
    assert binary.startswith(b"\x7fELF")
    for name in (
        b"merge",
        b"enter",
        b"gather",
        *(b"%s_%s" % (what, dtype) for what in (b"fold", b"finalise") for dtype in DTYPES),
    ):
        assert name + b"\0" in binary


DTYPES = (b"float16", b"bfloat16", b"float32")


def test_a_build_is_kept_for_the_next_process(tmp_path, compiled):
    first = merging().build("sm_90", tmp_path)
    assert merging().build("sm_90", tmp_path) == first
    assert len(compiled) == 1
    assert not list(tmp_path.glob("*.partial"))
    merging().build("sm_80", tmp_path)
    merging(128).build("sm_90", tmp_path)
    assert len(compiled) == len(list(tmp_path.iterdir())) == 3


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The folder with one build."""
    folder = tmp_path_factory.mktemp("kept")
    merging().build("sm_90", folder)
    return folder


@pytest.mark.parametrize("spoil", [lambda data: data[:-1], lambda data: data[:100] + b"!" + data[101:], lambda data: b""])
def test_a_spoilt_build_is_made_again(tmp_path, kept, compiled, spoil):
    (path,) = (tmp_path / build.name for build in kept.iterdir())
    first = merging().build("sm_90", shutil.copytree(kept, tmp_path, dirs_exist_ok=True))
    assert not compiled
    path.write_bytes(spoil(path.read_bytes()))
    assert merging().build("sm_90", tmp_path) == first
    assert merging().build("sm_90", tmp_path) == first
    assert len(compiled) == 1


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    assert merging().build("sm_90", tmp_path / "file").startswith(b"\x7fELF")


def test_the_cache_is_where_the_user_keeps_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    merging().build("sm_90")
    assert [path.suffix for path in (tmp_path / "oocattn").iterdir()] == [".cubin"]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert program._cache_folder() == tmp_path / "home" / ".cache" / "oocattn"


def test_what_does_not_compile_is_said_with_its_line(tmp_path):
    with pytest.raises(CompilationError, match=r"merge.cu does not compile .*merge.cu\(\d+\): error"):
        merging(-40).build("sm_90", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_user_without_a_home_keeps_nothing(tmp_path, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.chdir(tmp_path)
    assert merging().build("sm_90").startswith(b"\x7fELF")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # not allowed by the specification
    assert merging().build("sm_90").startswith(b"\x7fELF")
    assert not list(tmp_path.iterdir())
