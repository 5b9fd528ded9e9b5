"""Which build serves a process: found in the package or the cache, built anew where none loads."""

import sys

import pytest

from se_fused import build, native


@pytest.mark.parametrize(
    ("architectures", "gpu", "runs"),
    [
        (["80"], 86, True),
        (["86"], 80, False),
        (["80"], 90, False),
        (["80+PTX"], 90, True),
        (["90+PTX"], 80, False),
        (["75", "90"], 90, True),
        (["90a"], 90, True),
        (["100a"], 103, False),
        (["100a+PTX"], 120, False),
        (["100"], 103, True),
    ],
)
def test_on_which_gpus_code_runs(architectures, gpu, runs):
    assert native.runs_on(architectures, gpu) is runs


@pytest.fixture
def places(monkeypatch, tmp_path):
    """An empty package and an empty cache, and an H100."""
    packaged, cache = tmp_path / "packaged", tmp_path / "cache"
    packaged.mkdir()
    cache.mkdir(mode=0o700)
    monkeypatch.setattr(build, "PREBUILT", packaged)
    monkeypatch.setattr(build, "gpus", lambda: [90])
    monkeypatch.setenv("SE_FUSED_CACHE", str(cache))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))  # where no nvcc is
    return packaged, cache


def test_a_packaged_cuda_library_serves_gpus_that_it_has_code_for_and_needs_no_nvcc(places, monkeypatch):
    packaged, cache = places
    (packaged / f"{build.key('cuda')}-75-90").mkdir()
    assert native.library("cuda") == packaged / f"{build.key('cuda')}-75-90" / "libse_fused_cuda.so"
    monkeypatch.setattr(build, "gpus", lambda: [80, 90])
    assert native.library("cuda").parent.parent == packaged, "it serves one of two, and there is no nvcc for the other"
    monkeypatch.setattr(build, "gpus", lambda: [80])
    with pytest.raises(build.BuildError, match="no CUDA compiler"):
        native.library("cuda")
    (cache / f"{build.key('cuda')}-80").mkdir()
    assert native.library("cuda").parent.parent == cache


def test_a_library_of_other_sources_is_not_taken(places):
    packaged, _ = places
    (packaged / ("0" * 24 + "-90")).mkdir()
    with pytest.raises(build.BuildError, match="no CUDA compiler"):
        native.library("cuda")


@pytest.mark.parametrize("broken", ["packaged", "cached", "both"])
def test_a_library_that_does_not_load_is_built_anew(places, monkeypatch, broken, caplog):
    packaged, cache = places
    good = b"a library"
    builds = []

    def make(parent, group="cpu"):
        folder = parent / build.key(group)
        folder.mkdir()
        (folder / "libse_fused_cpu.so").write_bytes(good)
        builds.append(folder)
        return folder

    monkeypatch.setattr(build, "build", make)
    for folder in {"packaged": [packaged], "cached": [cache], "both": [packaged, cache]}[broken]:
        make(folder)
        (folder / build.key() / "libse_fused_cpu.so").write_bytes(b"of another libc")
    builds.clear()

    def loader(path):
        if path.read_bytes() != good:
            raise OSError("version `GLIBC_2.99' not found")
        return path

    assert native.load("cpu", loader).parent == cache / build.key()
    assert builds == [cache / build.key()]
    assert "GLIBC_2.99" in caplog.text


def test_a_library_that_never_loads_is_built_once(places, monkeypatch):
    builds = []

    def make(parent, group="cpu"):
        builds.append(parent / build.key(group))
        builds[-1].mkdir()
        return builds[-1]

    def never(path):
        raise OSError("wrong ELF class")

    monkeypatch.setattr(build, "build", make)
    for _ in range(3):
        with pytest.raises(build.BuildError, match="was built and does not load: wrong ELF class"):
            native.load("cpu", never)
    assert len(builds) == 1, "neither again nor by the next process"


def test_the_cache_folder_needs_a_name_or_platformdirs(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    monkeypatch.delenv("SE_FUSED_CACHE", raising=False)
    with pytest.raises(build.BuildError, match="platformdirs is not installed; SE_FUSED_CACHE names"):
        native._cache()
    monkeypatch.setenv("SE_FUSED_CACHE", str(tmp_path / "named"))
    assert native._cache() == tmp_path / "named"


def test_a_user_without_a_home_is_told_so(monkeypatch):
    import platformdirs

    def nowhere(name):
        raise RuntimeError("could not determine the home directory")

    monkeypatch.delenv("SE_FUSED_CACHE", raising=False)
    monkeypatch.setattr(platformdirs, "user_cache_dir", nowhere)
    with pytest.raises(build.BuildError, match="no cache folder: could not determine the home directory"):
        native._cache()


def test_a_cache_that_others_may_write_to_is_refused(monkeypatch, tmp_path):
    tmp_path.chmod(0o777)
    monkeypatch.setenv("SE_FUSED_CACHE", str(tmp_path))
    with pytest.raises(build.BuildError, match="others than this user may write to"):
        native._cache()
