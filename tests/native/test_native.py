"""The build that a process uses: found in the package or the cache, or built anew if none loads."""

import sys
from pathlib import Path

import pytest

from se_fused import native
from se_fused.native import BuildError, build, cache, gpus, manifest, recipe, toolchain


@pytest.fixture
def places(monkeypatch, tmp_path):
    """An empty package and an empty cache, and an H100."""
    packaged, cached = tmp_path / "packaged", tmp_path / "cache"
    packaged.mkdir()
    cached.mkdir(mode=0o700)
    monkeypatch.setattr(build, "PREBUILT", packaged)
    monkeypatch.setattr(gpus, "here", lambda: [90])
    monkeypatch.setenv("SE_FUSED_CACHE", str(cached))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))  # a folder without nvcc
    return packaged, cached


def made(folder, name, content=b"a library"):
    """Make a build, as the builder leaves it."""
    group = "cuda" if "cuda" in name else "cpu"
    files = [recipe.file_name(library) for library in recipe.GROUPS[group]]
    folder.mkdir(exist_ok=True)
    for file in files:
        (folder / file).write_bytes(content)
    manifest.write(folder, {"group": group}, files)
    return folder


def test_a_packaged_cuda_library_serves_gpus_that_it_has_code_for_and_needs_no_nvcc(places, monkeypatch):
    packaged, cached = places
    made(packaged / f"{recipe.key('cuda')}-75-90", "libse_fused_cuda.so")
    assert native.library("cuda") == packaged / f"{recipe.key('cuda')}-75-90" / "libse_fused_cuda.so"
    monkeypatch.setattr(gpus, "here", lambda: [80, 90])
    assert native.library("cuda").parent.parent == packaged, "code for one of two, and no nvcc for the other"
    monkeypatch.setattr(gpus, "here", lambda: [80])
    with pytest.raises(BuildError, match="no CUDA compiler"):
        native.library("cuda")
    made(cached / f"{recipe.key('cuda')}-80", "libse_fused_cuda.so")
    assert native.library("cuda").parent.parent == cached


def test_a_library_of_other_sources_is_not_taken(places):
    packaged, _ = places
    made(packaged / ("0" * 24 + "-90"), "libse_fused_cuda.so")
    with pytest.raises(BuildError, match="no CUDA compiler"):
        native.library("cuda")


@pytest.mark.parametrize("broken", ["packaged", "cached", "both"])
def test_a_library_that_does_not_load_is_built_anew(places, monkeypatch, broken, caplog):
    packaged, cached = places
    good = b"a library"
    builds = []

    def make(parent, group="cpu", watcher=None, refused=None, content=good):
        builds.append(made(parent / recipe.key(group), "libse_fused_cpu.so", content))
        return builds[-1]

    monkeypatch.setattr(build, "build", make)
    for folder in {"packaged": [packaged], "cached": [cached], "both": [packaged, cached]}[broken]:
        make(folder, content=b"of another libc")
    builds.clear()

    def loader(path):
        if path.read_bytes() != good:
            raise OSError("version `GLIBC_2.99' not found")
        return path

    assert native.load("cpu", loader).parent == cached / recipe.key()
    assert builds == [cached / recipe.key()]
    assert "GLIBC_2.99" in caplog.text


def test_a_library_that_never_loads_is_built_once(places, monkeypatch):
    builds = []

    def make(parent, group="cpu", watcher=None, refused=None):
        builds.append(made(parent / recipe.key(group), "libse_fused_cpu.so"))
        return builds[-1]

    def never(path):
        raise OSError("wrong ELF class")

    monkeypatch.setattr(build, "build", make)
    for _ in range(3):
        with pytest.raises(
            BuildError, match="was built and does not load: wrong ELF class; to build it again, remove it"
        ):
            native.load("cpu", never)
    assert len(builds) == 1, "neither again nor by the next process"
    assert native.load("cpu", lambda path: path).parent == builds[0], "where what was in the way is gone, it loads"


def test_a_disk_without_execution_is_named(places, monkeypatch):
    monkeypatch.setattr(build, "build", lambda parent, *_: made(parent / recipe.key(), "libse_fused_cpu.so"))

    def noexec(path):
        raise OSError("failed to map segment from shared object")

    with pytest.raises(BuildError, match="as where its disk is mounted noexec; SE_FUSED_CACHE names another"):
        native.load("cpu", noexec)


def test_a_package_folder_that_cannot_be_read_is_passed_over(places, monkeypatch, caplog):
    _, cached = places
    made(cached / recipe.key(), "libse_fused_cpu.so")
    is_dir = Path.is_dir

    def closed(path):
        if path.parent == build.PREBUILT:
            raise PermissionError(13, "Permission denied", str(path))
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", closed)
    assert native.library("cpu").parent.parent == cached
    assert "Permission denied" in caplog.text


def test_the_cache_folder_needs_a_name_or_platformdirs(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    monkeypatch.delenv("SE_FUSED_CACHE", raising=False)
    with pytest.raises(BuildError, match="platformdirs is not installed; SE_FUSED_CACHE names"):
        cache.folder()
    monkeypatch.setenv("SE_FUSED_CACHE", str(tmp_path / "named"))
    assert cache.folder() == tmp_path / "named"


def test_a_user_without_a_home_is_told_so(monkeypatch):
    import platformdirs

    def nowhere(name):
        raise RuntimeError("could not determine the home directory")

    monkeypatch.delenv("SE_FUSED_CACHE", raising=False)
    monkeypatch.setattr(platformdirs, "user_cache_dir", nowhere)
    with pytest.raises(BuildError, match="no cache folder: could not determine the home directory"):
        cache.folder()


def test_ninja_is_found_on_the_path_where_its_package_does_not_know_it(monkeypatch, tmp_path):
    """pip's isolated builds need this, because they do not run in an environment of their own."""
    import ninja

    monkeypatch.setattr(ninja, "BIN_DIR", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="not in any folder of the PATH"):
        toolchain.ninja()
    program = tmp_path / "ninja"
    program.touch(mode=0o700)
    assert toolchain.ninja() == str(program)
