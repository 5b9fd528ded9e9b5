// Replaces CUDA's header of this name, with the part of it that the kernels use.
#pragma once

#include "machine.h"

#define __pipeline_memcpy_async ::emulator::copy_async
#define __pipeline_commit()
#define __pipeline_wait_prior(count) ::emulator::await_copies()
