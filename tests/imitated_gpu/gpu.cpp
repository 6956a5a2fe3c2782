// A GPU imitated in host memory: tensors say "cuda", the CPU's kernels do the work, and what a GPU refuses is refused.
//
// For builds of torch without CUDA, whose CUDA dispatch key has no kernels: a boxed fallback shows each operation host views of its
// tensors and renames what comes back. Refused, as on a GPU: operations that mix devices (but for 0-d host tensors, host indices and
// copies), a host generator for the device's tensors, allocations beyond a limit (torch.OutOfMemoryError) and, when asked, whatever makes
// the host wait. Counted: bytes allocated and their peak. Not imitated: speed, CUDA's own rounding, scratch memory inside kernels.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/FakeGuardImpl.h>
#include <torch/library.h>

#include <atomic>
#include <set>

namespace {

using at::Tensor;
using c10::DispatchKey;
using c10::IValue;

constexpr auto GPU = c10::DeviceType::CUDA;
const c10::Device gpu(GPU, 0), host(c10::kCPU);

// ---------------------------------------------------------------------------------------------- memory

std::atomic<int64_t> allocated = 0, peak = 0, limit = INT64_MAX;

void charge(int64_t bytes) {
  const int64_t now = allocated += bytes;
  for (int64_t old = peak; old < now && !peak.compare_exchange_weak(old, now);) {
  }
  if (now <= limit) return;
  allocated -= bytes;
  TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", bytes, " bytes of ", limit.load(), " with ", now - bytes, " in use");
}

struct Held {  // what a tensor of the device keeps: the host's storage, and what it was charged for it
  c10::Storage storage;
  int64_t charged;
};
void release(void* held) {
  allocated -= static_cast<Held*>(held)->charged;
  delete static_cast<Held*>(held);
}
c10::DataPtr hold(const c10::Storage& storage, int64_t charged, c10::Device device) {
  charge(charged);
  return {storage.mutable_data(), new Held{storage, charged}, &release, device};
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    return hold(c10::Storage(c10::Storage::use_byte_size_t(), n, c10::GetCPUAllocator(), true), n, gpu);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }
} memory;

Tensor renamed(const Tensor& x, c10::Device device, int64_t charged) {
  auto* allocator = device == gpu ? &memory : c10::GetCPUAllocator();
  c10::Storage storage(c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), x.storage().nbytes(),
                                                             hold(x.storage(), charged, device), allocator, true));
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(device == gpu ? DispatchKey::CUDA : DispatchKey::CPU), x.dtype());
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(x.sizes(), x.strides(), x.storage_offset());
  if (x.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  made._set_conj(x.is_conj());
  made._set_neg(x.is_neg());
  return made;
}
Tensor on_host(const Tensor& x) { return renamed(x, host, 0); }

// ---------------------------------------------------------------------------------------------- random numbers, and what torch asks a GPU

struct Generator final : c10::GeneratorImpl {  // another name for one of the host, from which the CPU's kernels draw
  at::Generator drawn_from;
  explicit Generator(at::Generator of) : c10::GeneratorImpl(gpu, c10::DispatchKeySet(DispatchKey::CUDA)), drawn_from(std::move(of)) {}
  void set_current_seed(uint64_t seed) override { drawn_from.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return drawn_from.current_seed(); }
  uint64_t seed() override { return drawn_from.seed(); }
  void set_state(const c10::TensorImpl& state) override { drawn_from.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return drawn_from.unsafeGetGeneratorImpl()->get_state(); }
  Generator* clone_impl() const override { return new Generator(drawn_from.clone()); }
};

struct ImitatedHooks final : at::CUDAHooksInterface {
  explicit ImitatedHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  bool isPinnedPtr(const void*) const override { return false; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static const at::Generator made = at::make_generator<Generator>(at::detail::getDefaultCPUGenerator());
    return made;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Generator>(at::detail::createCPUGenerator()); }
};

// ---------------------------------------------------------------------------------------------- operations

bool waiting_raises = false;

void wait(const std::string& name) {
  TORCH_CHECK(!waiting_raises, "called a synchronizing CUDA operation: ", name);
}

const std::set<std::string> reads_back = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal",
                                          "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive"};
const std::set<std::string> indexes = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"};

template <typename Change>
void change_tensors(IValue& v, Change change) {  // where it is one, or a list of them
  if (v.isTensor()) {
    v = change(v.toTensor());
  } else if (v.isTensorList()) {
    c10::List<Tensor> made;
    for (const Tensor& x : v.toTensorVector()) made.push_back(change(x));
    v = made;
  }
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string& name = schema.name();
  const size_t n = schema.arguments().size(), first = stack->size() - n;
  std::vector<std::pair<Tensor, Tensor>> views;  // (the device's tensor, its view on the host)
  bool of_gpu = false, host_generator = false, of_host = false, masked = false;

  auto shown = [&](const Tensor& x) -> Tensor {
    if (!x.defined()) return x;
    if (x.device() != gpu) {
      of_host |= x.dim() > 0;
      return x;
    }
    of_gpu = true;
    for (auto& [theirs, ours] : views)
      if (theirs.is_same(x)) return ours;
    return views.emplace_back(x, on_host(x)).second;
  };
  auto show = [&](IValue& v) {
    change_tensors(v, shown);
    if (v.isOptionalTensorList()) {  // indices: either device's
      c10::List<std::optional<Tensor>> made;
      for (const std::optional<Tensor>& x : v.toOptionalTensorList().vec()) {
        made.push_back(x && x->defined() && x->device() == gpu ? shown(*x) : x);
        masked |= x && x->defined() && (x->scalar_type() == at::kBool || x->scalar_type() == at::kByte);
      }
      v = made;
    } else if (v.isDevice() && v.toDevice().type() == GPU) {
      of_gpu = true;
      v = host;
    } else if (v.isGenerator()) {
      auto drawn = v.toGenerator();
      host_generator |= drawn.device().type() != GPU;
      if (drawn.device().type() == GPU) v = static_cast<Generator*>(drawn.unsafeGetGeneratorImpl())->drawn_from;
    }
  };
  for (size_t i = 0; i < n; i++) show((*stack)[first + i]);
  TORCH_CHECK(!of_gpu || !of_host, "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu, in ", name);
  TORCH_CHECK(!of_gpu || !host_generator, "Expected a 'cuda' device type for generator but found 'cpu' in ", name);
  if (reads_back.count(name) || (masked && indexes.count(name))) wait(name);

  op.redispatchBoxed(c10::DispatchKeySet(DispatchKey::CPU), stack);

  for (auto& [theirs, ours] : views) {  // out= may have got another size, and with it other memory
    if (ours.storage().data() != theirs.storage().data()) theirs.unsafeGetTensorImpl()->set_storage_keep_dtype(renamed(ours, gpu, ours.storage().nbytes()).storage());
    if (ours.sizes() != theirs.sizes() || ours.strides() != theirs.strides())
      theirs.unsafeGetTensorImpl()->set_sizes_and_strides(ours.sizes(), ours.strides(), ours.storage_offset());
  }
  auto named = [&](const Tensor& x) -> Tensor {
    if (!x.defined() || x.device() == gpu) return x;
    bool viewed = false;
    for (auto& [theirs, ours] : views) {
      if (ours.is_same(x)) return theirs;
      viewed |= ours.storage().data() == x.storage().data();
    }
    return renamed(x, gpu, viewed ? 0 : x.storage().nbytes());
  };
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); i++) change_tensors((*stack)[i], named);
}

Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>,
             std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(DispatchKey::CUDA), c10::dtype_or_default(dtype), format);
}
Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, c10::DispatchKeySet(DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

Tensor& copy_(Tensor& to, const Tensor& from, bool non_blocking) {
  if (to.device() != from.device() && !(non_blocking && to.device() == gpu)) wait("copy between host and device");
  Tensor host_to = to.device() == gpu ? on_host(to) : to;
  host_to.copy_(from.device() == gpu ? on_host(from) : from);
  return to;
}

Tensor& set_storage_at(Tensor& self, at::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}
Tensor& set_storage(Tensor& self, at::Storage source) {
  const int64_t n = source.nbytes() / self.itemsize();
  return set_storage_at(self, std::move(source), 0, {n}, {1});
}
Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage_at(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
using CUDAHooks = ImitatedHooks;  // the name under which torch looks for them
REGISTER_CUDA_HOOKS(CUDAHooks);
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::FakeGuardImpl<GPU>);

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("resize_", at::native::resize_);
  m.impl("set_.source_Storage_storage_offset", set_storage_at);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Tensor", set_tensor);
}
TORCH_LIBRARY(imitated_gpu, m) {
  m.def("raise_on_wait(bool on) -> ()", [](bool on) { waiting_raises = on; });
  m.def("allocated() -> int", [] { return allocated.load(); });
  m.def("peak() -> int", [] { return peak.load(); });
  m.def("reset_peak() -> ()", [] { peak = allocated.load(); });
  m.def("limit(int bytes) -> ()", [](int64_t bytes) { limit = bytes; });
}
const bool known = (c10::SetAllocator(GPU, &memory, 255), true);

}  // namespace
