// A CUDA driver and a cuBLAS without a GPU: what `cuda::Device` asks of them, as strictly as the real ones and stricter.
//
// Nothing runs before somebody waits for it, so what is overwritten too early or waited for on the wrong stream gives wrong numbers here.
// Every allocation ends at a page that may not be touched and starts as NaNs. What may not happen while a stream is captured is counted
// as a violation and refused. Kernels are the real text (../kernels), run by machine.h. Start at `Stream`.
#include <sys/mman.h>

#include <chrono>
#include <deque>
#include <functional>
#include <map>
#include <string>

#include "../kernels/attention.cu"
#include "../kernels/cores.cu"
#include "../kernels/draw.cu"
#include "../kernels/factor.cu"
#include "../kernels/norm.cu"
#include "../kernels/quant.cu"
#include "../kernels/rows.cu"

typedef int Result;
typedef uint64_t Address;
enum { OK = 0, INVALID = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500, CAPTURE_UNSUPPORTED = 900, CAPTURE_ISOLATION = 905 };

namespace {
struct Kernel {
  const char* kinds;
  void (*run)(void**);
  size_t shared_limit;
};
template <auto F>
void run(void** arguments) {
  [&]<class... A>(void (*kernel)(A...)) { soft::call(kernel, arguments, std::index_sequence_for<A...>{}); }(F);
}
std::map<std::string, Kernel> kernels = {
#define K(NAME) {#NAME, {soft::kinds_of(NAME), run<NAME>, 48 << 10}}
    K(rms_norm), K(add_rms_norm), K(norm_residual), K(gather_residual), K(head_norm), K(gather_rows), K(silu_mul), K(add_bias), K(narrow), K(add_scaled), K(add_scaled_masses), K(add_mass), K(rope_append), K(draw),
    K(core_down), K(core_up), K(core_dense), K(close_gates), K(attend_16), K(attend_64), K(attend_128), K(attend_16_one), K(attend_64_one),
    K(attend_128_one), K(attend_combine), K(symmetric), K(widen), K(copy_block), K(shift_diagonal), K(factor_block), K(eigen),
    K(emit_low_rank), K(emit_dense), K(dequantise_4), K(dequantise_8), K(multiply_4), K(multiply_4_wide), K(multiply_8),
    K(multiply_8_wide),
#undef K
};

struct Event {
  uint64_t recorded = 0, done = 0;
  struct Stream* stream = nullptr;
  std::chrono::steady_clock::time_point at;
};
struct Operation {
  std::function<void()> work;
  Event* awaited = nullptr;
  uint64_t count = 0;
};
struct Stream {
  std::deque<Operation> queue;
  std::vector<Operation>* captured = nullptr;
};
struct Graph {
  std::vector<Operation> operations;
};
std::vector<Stream*> streams;
std::map<uintptr_t, size_t> device_memory, pinned_memory;  // address -> bytes
Graph* capture;
std::vector<std::string> violations;
uint64_t launched;

void violation(const char* where, const char* what) { violations.push_back(std::string(where) + ": " + what); }
#define NOT_IN_CAPTURE(WHAT)     \
  if (capture) {                 \
    violation(__func__, WHAT);   \
    return CAPTURE_UNSUPPORTED;  \
  }
#define OWN_STREAM(S)                          \
  if (!(S)) {                                  \
    violation(__func__, "the legacy stream");  \
    return INVALID;                            \
  }

void finish(Stream* stream) {
  while (!stream->queue.empty()) {
    Operation next = std::move(stream->queue.front());
    stream->queue.pop_front();
    if (next.awaited) {
      while (next.awaited->done < next.count && !next.awaited->stream->queue.empty()) finish(next.awaited->stream);
    } else {
      next.work();
    }
  }
}
void finish_all() {
  for (Stream* stream : streams) finish(stream);
}
void enqueue(Stream* stream, std::function<void()> work) {
  if (stream->captured) stream->captured->push_back({std::move(work)});
  else stream->queue.push_back({std::move(work)});
}
bool inside(const std::map<uintptr_t, size_t>& memory, uintptr_t at, size_t bytes) {
  auto next = memory.upper_bound(at);
  if (next == memory.begin()) return false;
  --next;
  return at + bytes <= next->first + next->second;
}

constexpr size_t PAGE = 4096;
uintptr_t guarded(size_t bytes) {
  const size_t rounded = (bytes + 15) / 16 * 16, pages = (rounded + PAGE - 1) / PAGE * PAGE;
  auto* at = (unsigned char*)mmap(nullptr, pages + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) return 0;
  mprotect(at + pages, PAGE, PROT_NONE);
  if (bytes <= 64 << 20) memset(at, 0xff, pages);
  return (uintptr_t)(at + pages - rounded);
}
void unguard(uintptr_t at, size_t bytes) {
  const size_t rounded = (bytes + 15) / 16 * 16, pages = (rounded + PAGE - 1) / PAGE * PAGE;
  munmap((void*)(at + rounded - pages), pages + PAGE);
}
}  // namespace

extern "C" {
// What no real driver has.
uint64_t soft_violations() { return violations.size(); }
const char* soft_violation(uint64_t i) { return i < violations.size() ? violations[i].c_str() : ""; }
uint64_t soft_launches() { return launched; }
const char* soft_kinds(const char* name) {
  auto found = kernels.find(name);
  return found == kernels.end() ? "" : found->second.kinds;
}

Result cuInit(unsigned) { return OK; }
Result cuDeviceGet(int* device, int ordinal) { *device = ordinal; return ordinal == 0 ? OK : INVALID; }
Result cuDeviceGetName(char* name, int length, int) { snprintf(name, length, "software device"); return OK; }
Result cuDeviceTotalMem_v2(size_t* bytes, int) { *bytes = (size_t)4 << 30; return OK; }
Result cuDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {
    case 16: *value = 4; break;        // multiprocessors
    case 75: *value = 9; break;        // compute capability
    case 76: *value = 0; break;
    case 97: *value = 232448; break;   // shared memory of a block, opted in
    default: *value = 0;
  }
  return OK;
}
Result cuDevicePrimaryCtxRetain(void** context, int) { *context = (void*)1; return OK; }
Result cuDevicePrimaryCtxRelease_v2(int) { return OK; }
Result cuCtxSetCurrent(void*) { return OK; }
Result cuGetErrorString(int code, const char** text) {
  *text = code == CAPTURE_UNSUPPORTED ? "operation not permitted when stream is capturing" : code == OUT_OF_MEMORY ? "out of memory" : "refused by the software device";
  return OK;
}

Result cuMemAlloc_v2(Address* address, size_t bytes) {
  NOT_IN_CAPTURE("allocates")
  if (!bytes || bytes > (size_t)4 << 30) return bytes ? OUT_OF_MEMORY : INVALID;
  if (!(*address = guarded(bytes))) return OUT_OF_MEMORY;
  device_memory[*address] = bytes;
  return OK;
}
Result cuMemFree_v2(Address address) {
  NOT_IN_CAPTURE("frees")
  finish_all();
  auto found = device_memory.find(address);
  if (found == device_memory.end()) return INVALID;
  unguard(found->first, found->second);
  device_memory.erase(found);
  return OK;
}
Result cuMemHostAlloc(void** address, size_t bytes, unsigned) {
  NOT_IN_CAPTURE("allocates")
  *address = (void*)guarded(bytes);
  if (!*address) return OUT_OF_MEMORY;
  pinned_memory[(uintptr_t)*address] = bytes;
  return OK;
}
Result cuMemFreeHost(void* address) {
  NOT_IN_CAPTURE("frees")
  finish_all();
  auto found = pinned_memory.find((uintptr_t)address);
  if (found == pinned_memory.end()) return INVALID;
  unguard(found->first, found->second);
  pinned_memory.erase(found);
  return OK;
}
Result cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t bytes, Stream* stream) {
  OWN_STREAM(stream)
  if (!inside(device_memory, to, bytes)) return INVALID;
  if (inside(pinned_memory, (uintptr_t)from, bytes)) {
    enqueue(stream, [=] { memcpy((void*)to, from, bytes); });
  } else {
    if (stream->captured) {
      violation(__func__, "pageable memory of the host");
      return CAPTURE_UNSUPPORTED;
    }
    std::vector<unsigned char> staged((const unsigned char*)from, (const unsigned char*)from + bytes);
    enqueue(stream, [=, staged = std::move(staged)] { memcpy((void*)to, staged.data(), bytes); });
  }
  return OK;
}
Result cuMemcpyDtoHAsync_v2(void* to, Address from, size_t bytes, Stream* stream) {
  OWN_STREAM(stream)
  if (!inside(device_memory, from, bytes)) return INVALID;
  const bool pinned = inside(pinned_memory, (uintptr_t)to, bytes);
  if (stream->captured && !pinned) {
    violation(__func__, "pageable memory of the host");
    return CAPTURE_UNSUPPORTED;
  }
  enqueue(stream, [=] { memcpy(to, (void*)from, bytes); });
  if (!pinned) finish(stream);
  return OK;
}
Result cuMemcpyDtoDAsync_v2(Address to, Address from, size_t bytes, Stream* stream) {
  OWN_STREAM(stream)
  if (!inside(device_memory, to, bytes) || !inside(device_memory, from, bytes)) return INVALID;
  enqueue(stream, [=] { memmove((void*)to, (void*)from, bytes); });
  return OK;
}
Result cuMemsetD8Async(Address to, unsigned char value, size_t bytes, Stream* stream) {
  OWN_STREAM(stream)
  if (!inside(device_memory, to, bytes)) return INVALID;
  enqueue(stream, [=] { memset((void*)to, value, bytes); });
  return OK;
}

Result cuStreamCreate(Stream** stream, unsigned flags) {
  NOT_IN_CAPTURE("makes a stream")
  if (flags != 1) violation(__func__, "a stream that waits for the legacy one");
  streams.push_back(*stream = new Stream);
  return OK;
}
Result cuStreamDestroy_v2(Stream* stream) {
  OWN_STREAM(stream)
  finish(stream);
  std::erase(streams, stream);
  delete stream;
  return OK;
}
Result cuStreamSynchronize(Stream* stream) {
  OWN_STREAM(stream)
  NOT_IN_CAPTURE("waits")
  finish(stream);
  return OK;
}
Result cuStreamWaitEvent(Stream* stream, Event* event, unsigned) {
  OWN_STREAM(stream)
  if (stream->captured) {
    violation(__func__, "an event from outside");
    return CAPTURE_ISOLATION;
  }
  if (event->recorded) stream->queue.push_back({{}, event, event->recorded});
  return OK;
}
Result cuEventCreate(Event** event, unsigned) { NOT_IN_CAPTURE("makes an event") *event = new Event; return OK; }
Result cuEventDestroy_v2(Event* event) {
  finish_all();
  delete event;
  return OK;
}
Result cuEventRecord(Event* event, Stream* stream) {
  OWN_STREAM(stream)
  if (stream->captured) {
    violation(__func__, "records an event that others outside wait for");
    return CAPTURE_UNSUPPORTED;
  }
  const uint64_t count = ++event->recorded;
  event->stream = stream;
  stream->queue.push_back({[=] {
    event->done = count;
    event->at = std::chrono::steady_clock::now();
  }});
  return OK;
}
Result cuEventSynchronize(Event* event) {
  NOT_IN_CAPTURE("waits")
  if (event->done < event->recorded) finish(event->stream);
  return OK;
}
Result cuEventElapsedTime(float* ms, Event* from, Event* to) {
  if (from->done < from->recorded || to->done < to->recorded) return 600;
  *ms = std::chrono::duration<float, std::milli>(to->at - from->at).count();
  return OK;
}

Result cuModuleLoadData(void** module, const void*) { NOT_IN_CAPTURE("loads a module") *module = (void*)1; return OK; }
Result cuModuleUnload(void*) { return OK; }
Result cuModuleGetFunction(Kernel** function, void*, const char* name) {
  NOT_IN_CAPTURE("loads a function")
  auto found = kernels.find(name);
  if (found == kernels.end()) return NOT_FOUND;
  *function = &found->second;
  return OK;
}
Result cuFuncSetAttribute(Kernel* function, int attribute, int value) {
  NOT_IN_CAPTURE("changes a function")
  if (attribute == 8) function->shared_limit = value;
  return value <= 232448 ? OK : INVALID;
}
Result cuLaunchKernel(Kernel* kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                      Stream* stream, void** arguments, void**) {
  OWN_STREAM(stream)
  const unsigned threads = bx * by * bz;
  if (!gx || !gy || !gz || gy > 65535 || gz > 65535 || !threads || threads > 1024 || threads % 32 || shared > kernel->shared_limit) return INVALID;
  std::vector<uint64_t> values;
  for (const char* kind = kernel->kinds; *kind; kind++) {
    uint64_t value = 0;
    memcpy(&value, arguments[values.size()], *kind == 'u' || *kind == 'f' ? 4 : 8);
    values.push_back(value);
  }
  enqueue(stream, [=]() mutable {
    std::vector<void*> pointers;
    for (auto& value : values) pointers.push_back(&value);
    soft::grid_size = {gx, gy, gz};
    soft::block_size = {bx, by, bz};
    soft::entry = kernel->run;
    soft::entry_arguments = pointers.data();
    for (unsigned z = 0; z < gz; z++)
      for (unsigned y = 0; y < gy; y++)
        for (unsigned x = 0; x < gx; x++) {
          soft::block_index = {x, y, z};
          soft::run_block(shared);
        }
  });
  launched++;
  return OK;
}

Result cuStreamBeginCapture_v2(Stream* stream, int) {
  OWN_STREAM(stream)
  NOT_IN_CAPTURE("captures twice")
  if (!stream->queue.empty()) finish(stream);
  capture = new Graph;
  stream->captured = &capture->operations;
  return OK;
}
Result cuStreamEndCapture(Stream* stream, Graph** graph) {
  if (!stream->captured) return INVALID;
  stream->captured = nullptr;
  *graph = capture;
  capture = nullptr;
  return OK;
}
Result cuGraphInstantiateWithFlags(Graph** executable, Graph* graph, unsigned long long) { *executable = new Graph(*graph); return OK; }
Result cuGraphUpload(Graph*, Stream*) { return OK; }
Result cuGraphLaunch(Graph* graph, Stream* stream) {
  OWN_STREAM(stream)
  NOT_IN_CAPTURE("launches a graph")
  for (auto& operation : graph->operations) stream->queue.push_back(operation);
  return OK;
}
Result cuGraphExecDestroy(Graph* graph) { finish_all(); delete graph; return OK; }
Result cuGraphDestroy(Graph* graph) { delete graph; return OK; }

// cuBLAS, column-major as the real one.
static Stream* blas_stream;
static size_t blas_workspace;
Result cublasCreate_v2(void** handle) { NOT_IN_CAPTURE("makes a handle") *handle = (void*)1; return OK; }
Result cublasDestroy_v2(void*) { return OK; }
Result cublasSetStream_v2(void*, Stream* stream) {
  OWN_STREAM(stream)
  NOT_IN_CAPTURE("resets the workspace")
  blas_stream = stream;
  blas_workspace = 0;
  return OK;
}
Result cublasSetWorkspace_v2(void*, void*, size_t bytes) { NOT_IN_CAPTURE("changes the workspace") blas_workspace = bytes; return OK; }
}

namespace {
// The bytes from the first to behind the last element that a matrix touches.
size_t reach(int rows, int columns, long ld, long stride, int batch, size_t element) {
  return ((size_t)(batch - 1) * stride + (size_t)(columns - 1) * ld + rows) * element;
}
// What the matrix units keep of an f32 operand: ten bits behind the first.
float as_tf32(float x) {
  uint32_t word;
  memcpy(&word, &x, 4);
  word = (word + 0xfffu + (word >> 13 & 1u)) & ~0x1fffu;
  memcpy(&x, &word, 4);
  return x;
}
template <class Sum>
Sum element(const void* from, int type, size_t at) {
  if (type == 14) return (Sum)to_float(((const bf16*)from)[at]);
  if (type == 0) return (Sum)((const float*)from)[at];
  return (Sum)((const double*)from)[at];
}
// c [m, n] = alpha op(a) [m, k] op(b) [k, n] + beta c, column-major; sums in `Sum`.
template <class Sum>
void multiply(bool ta, bool tb, int m, int n, int k, double alpha, const void* a, int at, long lda, const void* b, int bt, long ldb,
              double beta, void* c, int ct, long ldc, bool tf32) {
  std::vector<Sum> left((size_t)m * k), sum(m);
  for (int p = 0; p < k; p++)
    for (int i = 0; i < m; i++) left[(size_t)p * m + i] = element<Sum>(a, at, ta ? (size_t)i * lda + p : (size_t)p * lda + i);
  if (tf32)
    for (Sum& x : left) x = as_tf32((float)x);
  for (int j = 0; j < n; j++) {
    std::fill(sum.begin(), sum.end(), Sum(0));
    for (int p = 0; p < k; p++) {
      Sum y = element<Sum>(b, bt, tb ? (size_t)p * ldb + j : (size_t)j * ldb + p);
      if (tf32) y = as_tf32((float)y);
      const Sum* x = &left[(size_t)p * m];
      for (int i = 0; i < m; i++) sum[i] += x[i] * y;
    }
    for (int i = 0; i < m; i++) {
      const size_t to = (size_t)j * ldc + i;
      const Sum old = beta == 0.0 ? Sum(0) : (Sum)beta * element<Sum>(c, ct, to);
      const Sum value = (Sum)alpha * sum[i] + old;
      if (ct == 14) ((bf16*)c)[to] = to_bf16((float)value);
      else if (ct == 0) ((float*)c)[to] = (float)value;
      else ((double*)c)[to] = (double)value;
    }
  }
}
}  // namespace

extern "C" Result cublasGemmStridedBatchedEx(void*, int ta, int tb, int m, int n, int k, const void* alpha, const void* a, int at,
                                             int lda, long long stride_a, const void* b, int bt, int ldb, long long stride_b,
                                             const void* beta, void* c, int ct, int ldc, long long stride_c, int batch, int compute,
                                             int) {
  if (!blas_stream || !blas_workspace) {
    violation(__func__, "no stream or no workspace of its own");
    return 1;
  }
  // The pairs of computation and operands that are meant: f64, TF32 of f32, and f32 sums of bf16.
  if (at != bt || !((compute == 70 && at == 1) || (compute == 77 && at == 0) || (compute == 68 && at == 14))) return 15;
  auto size = [](int type) -> size_t { return type == 14 ? 2 : type == 0 ? 4 : 8; };
  if (m <= 0 || n <= 0 || k <= 0 || batch <= 0 || lda < (ta ? k : m) || ldb < (tb ? n : k) || ldc < m) return 7;
  if (!inside(device_memory, (uintptr_t)a, reach(ta ? k : m, ta ? m : k, lda, stride_a, batch, size(at))) ||
      !inside(device_memory, (uintptr_t)b, reach(tb ? n : k, tb ? k : n, ldb, stride_b, batch, size(bt))) ||
      !inside(device_memory, (uintptr_t)c, reach(m, n, ldc, stride_c, batch, size(ct))))
    return 7;
  const bool wide = compute == 70;
  const double x = wide ? *(const double*)alpha : *(const float*)alpha, y = wide ? *(const double*)beta : *(const float*)beta;
  enqueue(blas_stream, [=] {
    for (int i = 0; i < batch; i++) {
      auto moved = [&](const void* from, long long stride, int type) { return (const char*)from + (size_t)i * stride * size(type); };
      auto* run = wide ? multiply<double> : multiply<float>;
      run(ta, tb, m, n, k, x, moved(a, stride_a, at), at, lda, moved(b, stride_b, bt), bt, ldb, y, (void*)moved(c, stride_c, ct), ct,
          ldc, compute == 77);
    }
  });
  launched++;
  return OK;
}
