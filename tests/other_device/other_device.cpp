// A device beside the CPU. It computes on the CPU, but refuses what CUDA refuses: operands that lie on two devices, and
// the CPU's random generator. PyTorch keeps the key PrivateUse1 for devices made outside of it.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

using at::IntArrayRef;
using at::Tensor;

namespace {

constexpr auto TYPE = c10::DeviceType::PrivateUse1;
const c10::Device DEVICE(TYPE, 0);
const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

struct Memory final : at::Allocator {
  at::DataPtr allocate(size_t size) override {
    void* place = size ? std::malloc(size) : nullptr;
    return {place, place, &std::free, DEVICE};
  }
  at::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* target, const void* source, std::size_t size) const override {
    std::memcpy(target, source, size);
  }
};
Memory memory;
REGISTER_ALLOCATOR(TYPE, &memory);

// Autograd asks for streams and events; everything here is done by the time a call returns.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<TYPE> {
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream stream() const { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    auto* own = storage.unsafeGetStorageImpl();
    auto larger = memory.allocate(size);
    std::memcpy(larger.get(), own->data(), std::min(size, own->nbytes()));
    own->set_data_ptr_noswap(std::move(larger));
    own->set_nbytes(size);
  }
};
const bool registered = (at::RegisterPrivateUse1HooksInterface(new Hooks()), true);

Tensor empty(IntArrayRef size, std::optional<at::ScalarType> type, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, KEYS, c10::dtype_or_default(type), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<at::ScalarType> type,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, c10::dtype_or_default(type));
}

// The same memory, as a tensor of the CPU.
Tensor on_cpu(const Tensor& x) {
  if (x.device().is_cpu()) return x;
  void* place = x.numel() ? x.mutable_data_ptr() : nullptr;
  return at::from_blob(place, x.sizes(), x.strides(), [](void*) {}, x.options().device(at::kCPU));
}

Tensor copy_from(const Tensor& source, const Tensor& target, bool) {
  auto written = on_cpu(target);
  written.copy_(on_cpu(source));
  return target;
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
  at::native::resize_(target, source.sizes());
  return copy_from(source, target, false);
}

Tensor on_device(const Tensor& x) {
  return copy_from(x, empty_strided(x.sizes(), x.strides(), x.scalar_type(), {}, {}, {}), false);
}

const Tensor& resize(const Tensor& x, IntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(x, size, format);
}

Tensor& set_part(Tensor& x, at::Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  auto* own = x.unsafeGetTensorImpl();
  own->set_storage_keep_dtype(std::move(storage));
  own->set_sizes_and_strides(size, stride, offset);
  return x;
}

Tensor& set_whole(Tensor& x, at::Storage storage) {
  const auto count = static_cast<int64_t>(storage.nbytes() / x.dtype().itemsize());
  return set_part(x, std::move(storage), 0, {count}, {1});
}

Tensor convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, IntArrayRef stride,
                   IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef more, int64_t groups) {
  const bool biased = bias && bias->defined();
  TORCH_CHECK(x.device() == weight.device() && (!biased || bias->device() == x.device()), "two devices: convolution");
  const auto own = biased ? std::optional<Tensor>(on_cpu(*bias)) : std::nullopt;
  return on_device(
      at::convolution(on_cpu(x), on_cpu(weight), own, stride, padding, dilation, transposed, more, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& gradient, const Tensor& x, const Tensor& weight,
                                                        IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                                        bool transposed, IntArrayRef more, int64_t groups,
                                                        std::array<bool, 3> wanted) {
  const auto [of_x, of_weight, of_bias] =
      at::convolution_backward(on_cpu(gradient), on_cpu(x), on_cpu(weight), IntArrayRef({weight.size(0)}), stride,
                               padding, dilation, transposed, more, groups, wanted);
  return {wanted[0] ? on_device(of_x) : Tensor(), wanted[1] ? on_device(of_weight) : Tensor(),
          wanted[2] ? on_device(of_bias) : Tensor()};
}

// All other operators: on the CPU, once their operands lie on one device. Numbers of no dimension, and the list of indices
// that indexing takes, may lie elsewhere.
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.schema().name();
  const bool indexing = name == "aten::index" || name == "aten::index_put" || name == "aten::index_put_" ||
                        name == "aten::_index_put_impl_";
  bool here = false, elsewhere = false, generator = false;
  const auto look = [&](const Tensor& x) {
    if (!x.defined()) return;
    (x.device() == DEVICE ? here : elsewhere) |= x.device() == DEVICE || x.dim() > 0;
  };
  for (const auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (value.isTensor()) look(value.toTensor());
    generator |= value.isGenerator();
    if (value.isList() && !indexing)
      for (const at::IValue& item : value.toListRef())
        if (item.isTensor()) look(item.toTensor());
  }
  TORCH_CHECK(!here || !elsewhere, "two devices: ", name);
  TORCH_CHECK(!here || !generator, "the CPU's generator for another device: ", name);
  at::native::cpu_fallback(op, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage", &set_whole);
  m.impl("set_.source_Storage_storage_offset", &set_part);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
}
