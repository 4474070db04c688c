// A make-believe accelerator for tests: main memory, split into devices of so many bytes each, behind the CUDA
// dispatch key of a CPU build of torch. Every operator runs its CPU kernel on the same bytes.
//
// What it is strict about:
//   bytes      are counted per device, cached as CUDA's allocator caches them, and refused above the limit
//   devices    tensors of two devices never meet in one operator; CPU scalars and CPU indexes may, as on a card
//   threads    each has a current device of its own, and starts on device 0
//
// devices.py loads this before torch, and answers what Python's torch.cuda asks of torch._C.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <vector>

namespace {

constexpr auto KIND = c10::DeviceType::CUDA;
constexpr int MOST_DEVICES = 8;
constexpr size_t ROUND_BYTES = 512;  // as CUDA's allocator rounds
constexpr size_t MAPPED_BYTES = 1 << 16;  // what is larger is a mapping of its own, see taken()

int device_count = 0;
size_t total_bytes[MOST_DEVICES];    // what the device says that it has
size_t allowed_bytes[MOST_DEVICES];  // what it gives: less under set_per_process_memory_fraction
thread_local c10::DeviceIndex current = 0;

c10::DeviceIndex exchange(c10::DeviceIndex to) {
  const auto before = current;
  if (to >= 0) {
    TORCH_CHECK(to < device_count, "CUDA error: invalid device ordinal");
    current = to;
  }
  return before;
}

// The current device inside a scope.
struct On {
  c10::DeviceIndex before;
  explicit On(c10::DeviceIndex device) : before(exchange(device)) {}
  ~On() { current = before; }
};

// ---- memory

// Bytes of a device. Large ones are shared mappings: Linux counts those apart (RssShmem) and not as the data of the
// process, so that its main memory can be measured and limited beside what lies on the devices.
void* taken(size_t bytes) {
  void* data = nullptr;
  if (bytes < MAPPED_BYTES) return posix_memalign(&data, 64, bytes) == 0 ? data : nullptr;
  data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  return data == MAP_FAILED ? nullptr : data;
}

void given_back(void* data, size_t bytes) {
  if (bytes < MAPPED_BYTES) {
    std::free(data);
  } else {
    munmap(data, bytes);
  }
}

struct Block {
  void* data;
  size_t bytes;
  c10::DeviceIndex device;
};

struct FakeAllocator final : c10::DeviceAllocator {
  std::mutex mutex;
  c10::CachingDeviceAllocator::DeviceStats stats[MOST_DEVICES];
  std::multimap<size_t, void*> cached[MOST_DEVICES];
  int64_t flushes = 0;

  size_t reserved(int device) const { return static_cast<size_t>(stats[device].reserved_bytes[0].current); }

  void drop_cache(int device) {
    for (auto& [bytes, data] : cached[device]) {
      given_back(data, bytes);
      stats[device].reserved_bytes[0].decrease(bytes);
    }
    cached[device].clear();
  }

  void* taken_from_cache(size_t bytes, int device) {
    auto found = cached[device].find(bytes);
    if (found == cached[device].end()) return nullptr;
    void* data = found->second;
    cached[device].erase(found);
    return data;
  }

  void* reserve(size_t bytes, int device) {
    auto& s = stats[device];
    if (reserved(device) + bytes > allowed_bytes[device]) {
      ++s.num_alloc_retries;
      drop_cache(device);
    }
    if (reserved(device) + bytes > allowed_bytes[device]) {
      ++s.num_ooms;
      constexpr double mib = 1 << 20;
      const size_t left = allowed_bytes[device] - std::min(allowed_bytes[device], reserved(device));
      TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", bytes / mib, " MiB. GPU ",
                       device, " has a total capacity of ", total_bytes[device] / mib, " MiB of which ", left / mib,
                       " MiB is free.");
    }
    void* data = taken(bytes);
    TORCH_CHECK(data, "no main memory is left for the make-believe device");
    s.reserved_bytes[0].increase(bytes);
    return data;
  }

  c10::DataPtr allocate(size_t wanted) override {
    const auto device = current;
    if (wanted == 0) return {nullptr, c10::Device(KIND, device)};
    const size_t bytes = (wanted + ROUND_BYTES - 1) / ROUND_BYTES * ROUND_BYTES;
    std::lock_guard<std::mutex> lock(mutex);
    void* data = taken_from_cache(bytes, device);
    if (!data) data = reserve(bytes, device);
    stats[device].allocated_bytes[0].increase(bytes);
    stats[device].allocation[0].increase(1);
    return {data, new Block{data, bytes, device}, &free_block, c10::Device(KIND, device)};
  }

  static void free_block(void* context);
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {
    std::lock_guard<std::mutex> lock(mutex);
    ++flushes;
    for (int i = 0; i < device_count; ++i) drop_cache(i);
  }
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex i) override {
    std::lock_guard<std::mutex> lock(mutex);
    return stats[i];
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex i) override {
    std::lock_guard<std::mutex> lock(mutex);
    stats[i].allocated_bytes[0].reset_peak();
    stats[i].reserved_bytes[0].reset_peak();
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex i) override {
    std::lock_guard<std::mutex> lock(mutex);
    return {total_bytes[i] - std::min(total_bytes[i], reserved(i)), total_bytes[i]};
  }
};

FakeAllocator& allocator() {
  static auto* one = new FakeAllocator;
  return *one;
}

// ---- copies that a device makes by itself, from pinned memory, while the host goes on

// As late as a card may make them: when an operator runs on it, or someone waits. Who writes into the pinned
// memory before has spoiled what arrives.
struct Copies {
  struct Copy {
    char* to;
    const char* from;
    size_t bytes;
  };
  std::mutex mutex;
  std::vector<Copy> waiting;

  void add(Copy copy) {
    std::lock_guard<std::mutex> lock(mutex);
    waiting.push_back(copy);
  }
  void make() {
    std::lock_guard<std::mutex> lock(mutex);
    for (const auto& [to, from, bytes] : waiting) std::memcpy(to, from, bytes);
    waiting.clear();
  }
};

Copies& copies() {
  static auto* one = new Copies;
  return *one;
}

void FakeAllocator::free_block(void* context) {
  copies().make();
  auto* block = static_cast<Block*>(context);
  auto& owner = allocator();
  std::lock_guard<std::mutex> lock(owner.mutex);
  owner.stats[block->device].allocated_bytes[0].decrease(block->bytes);
  owner.stats[block->device].allocation[0].decrease(1);
  owner.cached[block->device].emplace(block->bytes, block->data);
  delete block;
}

// ---- main memory that devices copy from: pinned, which here means that it is counted, and copied from late

struct PinnedAllocator final : c10::Allocator {
  std::mutex mutex;
  std::map<const char*, size_t> held;
  size_t now = 0, most = 0;

  c10::DataPtr allocate(size_t bytes) override {
    void* data = nullptr;
    TORCH_CHECK(posix_memalign(&data, 64, std::max<size_t>(bytes, 1)) == 0, "no main memory is left to be pinned");
    std::lock_guard<std::mutex> lock(mutex);
    held[static_cast<const char*>(data)] = bytes;
    most = std::max(most, now += bytes);
    return {data, data, &give_back, c10::kCPU};
  }
  static void give_back(void* data);
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
  bool holds(const void* data) {
    std::lock_guard<std::mutex> lock(mutex);
    auto next = held.upper_bound(static_cast<const char*>(data));
    if (next == held.begin()) return false;
    --next;
    return static_cast<const char*>(data) < next->first + std::max<size_t>(next->second, 1);
  }
};

PinnedAllocator& pinned_allocator() {
  static auto* one = new PinnedAllocator;
  return *one;
}

void PinnedAllocator::give_back(void* data) {
  copies().make();  // torch keeps memory that is copied from until it has been
  auto& owner = pinned_allocator();
  std::lock_guard<std::mutex> lock(owner.mutex);
  auto found = owner.held.find(static_cast<const char*>(data));
  owner.now -= found->second;
  owner.held.erase(found);
  std::free(data);
}

// ---- devices: one stream each, on which everything but copies from pinned memory is done at once

struct FakeGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return KIND; }
  c10::Device exchangeDevice(c10::Device d) const override { return {KIND, exchange(d.index())}; }
  c10::Device getDevice() const override { return {KIND, current}; }
  void setDevice(c10::Device d) const override { exchange(d.index()); }
  void uncheckedSetDevice(c10::Device d) const noexcept override {
    if (d.index() >= 0) current = d.index();
  }
  c10::Stream getStream(c10::Device d) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::Stream getDefaultStream(c10::Device d) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::Stream getNewStream(c10::Device d, int) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::Stream getStreamFromGlobalPool(c10::Device d, bool) const override {
    return c10::Stream(c10::Stream::DEFAULT, d);
  }
  c10::Stream exchangeStream(c10::Stream s) const override { return s; }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { copies().make(); }
  void synchronizeEvent(void*) const override { copies().make(); }
  void synchronizeDevice(c10::DeviceIndex) const override { copies().make(); }
  c10::DeviceIndex deviceCount() const noexcept override { return device_count; }
};

// ---- random numbers: a CPU generator that says that it belongs to the device

struct FakeGenerator final : c10::GeneratorImpl {
  at::Generator inner = at::detail::createCPUGenerator();
  explicit FakeGenerator(c10::DeviceIndex i)
      : GeneratorImpl({KIND, i}, c10::DispatchKeySet(c10::DispatchKey::CUDA)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return inner.unsafeGetGeneratorImpl()->get_state();
  }
  FakeGenerator* clone_impl() const override {
    auto* made = new FakeGenerator(device_.index());
    made->inner = inner.clone();
    return made;
  }
};

// The generator that random operators draw from where none is given. Python asks for it as for a new one.
at::Generator& default_generator(c10::DeviceIndex i) {
  static auto* all = new std::map<c10::DeviceIndex, at::Generator>;
  auto found = all->find(i);
  if (found == all->end()) found = all->emplace(i, at::make_generator<FakeGenerator>(i)).first;
  return found->second;
}

bool gives_defaults = false;

}  // namespace

struct CUDAHooks final : at::CUDAHooksInterface {  // ATen looks it up under this name
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex current_device() const override { return current; }
  c10::DeviceIndex deviceCount() const override { return device_count; }
  int getNumGPUs() const override { return device_count; }
  void setCurrentDevice(c10::DeviceIndex i) const override { exchange(i); }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex i) const override { return exchange(i); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex i) const override { return exchange(i); }
  c10::Allocator* getCUDADeviceAllocator() const override { return &allocator(); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator(); }
  bool isPinnedPtr(const void* data) const override { return pinned_allocator().holds(data); }
  void deviceSynchronize(c10::DeviceIndex) const override { copies().make(); }
  at::Generator getNewGenerator(c10::DeviceIndex i) const override {
    const c10::DeviceIndex index = i < 0 ? current : i;
    return gives_defaults ? default_generator(index) : at::make_generator<FakeGenerator>(index);
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex i) const override {
    return default_generator(i < 0 ? current : i);
  }
  std::string showConfig() const override { return "a make-believe CUDA in main memory"; }
};

namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks)
}

namespace {

C10_REGISTER_GUARD_IMPL(CUDA, FakeGuard)

// ---- operators

bool is_fake(const at::Tensor& t) { return t.defined() && t.device().type() == KIND; }

// CPU tensors over the bytes of device tensors; tensors of one storage share one on the CPU side, too.
struct Aliases {
  std::map<c10::StorageImpl*, c10::Storage> storages;

  at::Tensor of(const at::Tensor& t) {
    if (!is_fake(t)) return t;
    auto& storage = storages[t.storage().unsafeGetStorageImpl()];
    if (!storage) {
      auto* keep = new c10::Storage(t.storage());
      auto forget = [](void* kept) { delete static_cast<c10::Storage*>(kept); };
      c10::DataPtr data(t.storage().mutable_data(), keep, forget, c10::kCPU);
      storage = c10::Storage(c10::Storage::use_byte_size_t(), t.storage().nbytes(), std::move(data),
                             c10::GetCPUAllocator(), true);
    }
    auto made = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage),
                                                         c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
    auto* impl = made.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
    if (t.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
    if (t.is_conj()) made._set_conj(true);
    if (t.is_neg()) made._set_neg(true);
    return made;
  }
};

c10::DeviceIndex index_or_current(std::optional<at::Device> device) {
  return device && device->has_index() ? device->index() : current;
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  On on(index_or_current(device));
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                           &allocator(), c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           c10::dtype_or_default(dtype));
}

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  On on(index_or_current(device));
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &allocator(),
                                   c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype), format);
}

// A result of the CPU kernel, handed over: bytes of the device, the same strides.
at::Tensor to_device(const at::Tensor& t, c10::Device device) {
  if (!t.defined() || t.device().type() != c10::kCPU) return t;
  auto made = empty_strided(c10::fromIntArrayRefSlow(t.sizes()), c10::fromIntArrayRefSlow(t.strides()),
                            t.scalar_type(), {}, device, {});
  Aliases aliases;
  aliases.of(made).copy_(t);
  return made;
}

bool is_left_to_the_device(const at::Tensor& self, const at::Tensor& src) {
  return is_fake(self) && src.device().is_cpu() && self.numel() > 0 && self.is_contiguous() && src.is_contiguous() &&
         self.scalar_type() == src.scalar_type() && self.sizes() == src.sizes() &&
         pinned_allocator().holds(src.const_data_ptr());
}

// the one operator that crosses devices
at::Tensor& copy_(at::Tensor& self, const at::Tensor& src, bool non_blocking) {
  at::AutoDispatchBelowADInplaceOrView guard;
  if (non_blocking && is_left_to_the_device(self, src)) {
    copies().add({static_cast<char*>(self.mutable_data_ptr()), static_cast<const char*>(src.const_data_ptr()),
                  self.nbytes()});
    return self;
  }
  copies().make();
  Aliases aliases;
  aliases.of(self).copy_(aliases.of(src));
  return self;
}

const at::Tensor& resize_(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  if (format && *format != at::MemoryFormat::Contiguous && *format != at::MemoryFormat::Preserve)
    impl->empty_tensor_restride(*format);
  const size_t wanted = (impl->storage_offset() + impl->numel()) * impl->itemsize();
  auto* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  if (wanted > storage->nbytes()) {
    On on(self.device().index());
    auto data = allocator().allocate(wanted);
    copies().make();
    if (storage->nbytes()) std::memcpy(data.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(data));
    storage->set_nbytes(wanted);
  }
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size,
                        c10::SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  return self;
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& src) {
  return set_storage(self, src.storage(), src.storage_offset(), c10::fromIntArrayRefSlow(src.sizes()),
                     c10::fromIntArrayRefSlow(src.strides()));
}

at::Tensor& set_whole(at::Tensor& self, at::Storage storage) {
  const int64_t n = storage.nbytes() / self.itemsize(), one = 1;
  return set_storage(self, storage, 0, c10::fromIntArrayRefSlow({&n, 1}), c10::fromIntArrayRefSlow({&one, 1}));
}

at::Tensor& set_nothing(at::Tensor& self) { return set_tensor(self, at::empty({0}, self.options())); }

bool takes_cpu_indexes(const std::string& name) {
  static const std::set<std::string> names{"aten::index",           "aten::index_put",
                                           "aten::index_put_",      "aten::_index_put_impl_",
                                           "aten::_unsafe_index",   "aten::_unsafe_index_put"};
  return names.count(name) > 0;
}

// Which device an operator runs on; an error where its tensors lie on two.
c10::Device device_of(const c10::FunctionSchema& schema, const std::vector<c10::IValue>& given) {
  std::optional<c10::Device> device, stranger;
  const bool indexes = takes_cpu_indexes(schema.name());
  auto look = [&](const at::Tensor& t, bool may_be_cpu) {
    if (!t.defined()) return;
    if (is_fake(t)) {
      if (device && *device != t.device()) stranger = t.device();
      if (!device) device = t.device();
    } else if (t.device().type() == c10::kCPU ? (t.dim() > 0 && !may_be_cpu) : true) {
      stranger = t.device();
    }
  };
  for (size_t i = 0; i < given.size(); ++i) {
    const auto& value = given[i];
    if (value.isTensor()) {
      look(value.toTensor(), indexes && i > 0);
    } else if (value.isTensorList()) {
      for (const at::Tensor& t : value.toTensorList()) look(t, indexes);
    } else if (value.isOptionalTensorList()) {
      for (const std::optional<at::Tensor>& t : value.toOptionalTensorList())
        if (t) look(*t, indexes);
    } else if (value.isDevice() && value.toDevice().type() == KIND && !device) {
      device = value.toDevice();
    }
  }
  TORCH_CHECK(!(device && stranger), "Expected all tensors to be on the same device, but found at least two devices, ",
              device->str(), " and ", stranger->str(), "! (in ", schema.name(), ")");
  return device && device->has_index() ? *device : c10::Device(KIND, current);
}

bool asks_for_generator(const c10::Argument& argument) {
  static const auto generator = c10::GeneratorType::get();
  return argument.type()->isSubtypeOf(*c10::OptionalType::create(generator));
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  at::AutoDispatchBelowADInplaceOrView guard;
  copies().make();
  const auto& schema = op.schema();
  const size_t count = schema.arguments().size(), first = stack->size() - count;
  const std::vector<c10::IValue> given(stack->begin() + first, stack->end());
  const auto device = device_of(schema, given);

  // run the CPU kernel on the same bytes
  Aliases aliases;
  std::vector<std::pair<at::Tensor, at::Tensor>> written;  // on the device, and its alias
  auto aliased = [&](const at::Tensor& t, size_t argument) {
    auto alias = aliases.of(t);
    const auto* info = schema.arguments()[argument].alias_info();
    if (is_fake(t) && info && info->isWrite()) written.emplace_back(t, alias);
    return alias;
  };
  for (size_t i = 0; i < count; ++i) {
    auto& value = (*stack)[first + i];
    if (value.isTensor()) {
      if (is_fake(value.toTensor())) value = aliased(value.toTensor(), i);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorList()) list.push_back(aliased(t, i));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& t : value.toOptionalTensorList())
        list.push_back(t ? std::optional<at::Tensor>(aliased(*t, i)) : t);
      value = list;
    } else if (asks_for_generator(schema.arguments()[i])) {
      const auto generator = value.isGenerator() ? value.toGenerator() : default_generator(device.index());
      if (auto* fake = dynamic_cast<FakeGenerator*>(generator.unsafeGetGeneratorImpl())) value = fake->inner;
    } else if (value.isDevice()) {
      value = c10::Device(c10::kCPU);
    }
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);

  // what was written to and changed its size; then the results
  for (auto& [real, alias] : written) {
    if (real.sizes() == alias.sizes() && alias.const_data_ptr() == real.const_data_ptr()) continue;
    real.resize_(alias.sizes());
    copy_(real, alias, false);
  }
  const auto& returns = schema.returns();
  const size_t out = stack->size() - returns.size();
  for (size_t i = 0; i < returns.size(); ++i) {
    auto& value = (*stack)[out + i];
    const auto* info = returns[i].alias_info();
    if (info && info->isWrite()) {
      for (size_t k = 0; k < count; ++k) {
        const auto* other = schema.arguments()[k].alias_info();
        if (other && *other == *info) {
          value = given[k];
          break;
        }
      }
    } else if (value.isTensor()) {
      TORCH_CHECK_NOT_IMPLEMENTED(!info, schema.name(), " is a view operator without an implementation here");
      value = to_device(value.toTensor(), device);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorList()) list.push_back(to_device(t, device));
      value = list;
    }
  }
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("view", at::native::view);
  m.impl("view.dtype", at::native::view_dtype);
  m.impl("unfold", at::native::unfold);
  m.impl("copy_", copy_);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("set_", set_nothing);
  for (const char* name : {"scaled_dot_product_attention", "_fused_sdp_choice"})  // these choose by device type
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

struct Registered {
  Registered() { c10::SetAllocator(KIND, &allocator(), 255); }
} registered;

}  // namespace

// ---- the handles of devices.py

extern "C" {
int fake_most_devices() { return MOST_DEVICES; }
void fake_set_devices(int count, const size_t* bytes) {
  device_count = count;
  std::copy(bytes, bytes + count, total_bytes);
  std::copy(bytes, bytes + count, allowed_bytes);
}
void fake_allow(int i, size_t bytes) { allowed_bytes[i] = bytes; }
void fake_drop_cache(int i) {
  std::lock_guard<std::mutex> lock(allocator().mutex);
  allocator().drop_cache(i);
}
void fake_give_defaults(bool yes) { gives_defaults = yes; }
void fake_synchronize() { copies().make(); }
int64_t fake_copies() {
  std::lock_guard<std::mutex> lock(copies().mutex);
  return static_cast<int64_t>(copies().waiting.size());
}
int fake_count() { return device_count; }
int fake_current() { return current; }
int fake_exchange(int i) {
  const int before = current;
  if (i >= 0 && i < device_count) current = i;
  return before;
}
int64_t fake_flushes() { return allocator().flushes; }
int64_t fake_pinned() { return pinned_allocator().now; }
int64_t fake_most_pinned() { return pinned_allocator().most; }
void fake_forget_pinned() { pinned_allocator().most = pinned_allocator().now; }
int64_t fake_ooms(int i) { return allocator().stats[i].num_ooms; }
}
