// Stands in for CUDA's header of this name: as much of it as the kernels use.
#pragma once

#include "machine.h"

#define __pipeline_memcpy_async ::emulator::copy_async
#define __pipeline_commit()
#define __pipeline_wait_prior(count) ::emulator::await_copies()
