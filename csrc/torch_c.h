// The C functions of torch's stable ABI that the native code calls, as they are from torch 2.10 on. They are declared
// here so that building needs no torch, and one library works with every later torch. dev/emulator/binding.cpp also
// includes torch's own headers: it does not compile if a declaration differs.
#pragma once

#include <cstdint>

struct AtenTensorOpaque;
using AtenTensorHandle = AtenTensorOpaque*;
class TorchLibraryOpaque;
using TorchLibraryHandle = TorchLibraryOpaque*;
struct DeviceGuardOpaque;
using DeviceGuardHandle = DeviceGuardOpaque*;

using AOTITorchError = int32_t;  // 0: success
// An argument of an operator, in 8 bytes: a number or a tensor's handle; if the argument may be None, null or a pointer
// to such a value. The callee owns handles and pointers.
using StableIValue = uint64_t;

extern "C" {
AOTITorchError aoti_torch_library_init_impl(const char* ns, const char* dispatch_key, const char* file, uint32_t line,
                                            TorchLibraryHandle* library);
AOTITorchError torch_library_impl(TorchLibraryHandle library, const char* name,
                                  void (*function)(StableIValue* stack, uint64_t arguments, uint64_t results),
                                  uint64_t abi_version);
AOTITorchError aoti_torch_delete_library_object(TorchLibraryHandle library);

AOTITorchError aoti_torch_is_defined(AtenTensorHandle tensor, bool* is_defined);
AOTITorchError aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* dim);
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle tensor, int64_t** borrowed);
AOTITorchError aoti_torch_get_strides(AtenTensorHandle tensor, int64_t** borrowed);
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* dtype);
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* index);
AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle tensor, void** borrowed);
AOTITorchError aoti_torch_empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                        int32_t device_type, int32_t device_index, AtenTensorHandle* tensor);
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor);

int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_float64();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_uint8();
int32_t aoti_torch_device_type_cuda();

AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                                  void (*body)(int64_t begin, int64_t end, void* context), void* context);
AOTITorchError torch_get_num_threads(uint32_t* count);

AOTITorchError aoti_torch_create_device_guard(int32_t index, DeviceGuardHandle* guard);
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle guard);
// Only in a torch that is built for CUDA.
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream) __attribute__((weak));
}
