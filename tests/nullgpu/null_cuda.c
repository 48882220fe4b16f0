/* A CUDA that computes nothing, for tests without a GPU.
 *
 * It is loaded in front of libcudart, cuBLAS, NCCL and libcuda (LD_PRELOAD). Device memory is host
 * memory that nobody writes, a kernel launch is a count, and every event that matters calls
 * `null_hook`. Streams, events and graphs know enough to refuse what CUDA refuses while a stream
 * captures. Functions that are not here return success: null_cuda.py makes stubs of them.
 */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* --- figures, which null_cuda.py reads by name --------------------------------------------------*/

#define FIGURES(X)                                                                                \
  X(launches) X(triton) X(products) X(collectives) X(device_copies) X(fills) X(pageable_copies)   \
  X(pinned_copies) X(copies_to_host) X(pageable_to_host) X(bytes_to_device) X(bytes_to_host)      \
  X(stream_waits) X(event_waits) X(earlier_event_waits) X(device_waits) X(blocking_copies)        \
  X(mallocs) X(host_allocs)                                                                       \
  X(captured) X(beside_capture) X(graph_launches) X(graph_nodes)
#define DECLARE(name) unsigned long null_##name;
FIGURES(DECLARE)
#define ZERO(name) null_##name = 0;
int null_keep; /* what came from the host goes back; else the host reads zeros */

/* Called with what happened and its bytes, in the thread in which it did. */
enum { OPERATION, WAIT, HOST_COPY, PAGEABLE_COPY, MEMORY, REFUSAL };
void (*null_hook)(int kind, const char *what, unsigned long bytes);
static __thread int inside;
static void tell(int kind, const char *what, unsigned long bytes) {
  if (!null_hook || inside) return;
  inside = 1;
  null_hook(kind, what, bytes);
  inside = 0;
}

/* Kernels by address, with their names and how often each was launched. */
typedef struct { const void *key; const char *name; unsigned long launches; } kernel;
#define KERNELS (1 << 20)
static kernel kernels[KERNELS];
static kernel *kernel_of(const void *key) {
  unsigned long place = ((unsigned long)key * 0x9E3779B97F4A7C15ul >> 44) % KERNELS;
  while (kernels[place].key && kernels[place].key != key) place = (place + 1) % KERNELS;
  kernels[place].key = key;
  return kernels + place;
}
static void name_kernel(const void *key, const char *name) {
  pthread_mutex_lock(&lock);
  kernel_of(key)->name = name;
  pthread_mutex_unlock(&lock);
}
static unsigned long resets;
void null_reset(void) {
  FIGURES(ZERO)
  resets++;
  for (int i = 0; i < KERNELS; i++) kernels[i].launches = 0;
}
int null_dump(const char *path) {
  FILE *file = fopen(path, "w");
  if (!file) return 1;
  for (int i = 0; i < KERNELS; i++)
    if (kernels[i].launches)
      fprintf(file, "%lu\t%s\n", kernels[i].launches, kernels[i].name ? kernels[i].name : "?");
  return fclose(file);
}

/* --- streams, events, capture -------------------------------------------------------------------*/

typedef struct {
  int open, broken; /* broken: CUDA calls it invalidated */
  unsigned long long id;
  enum cudaStreamCaptureMode mode;
  pthread_t thread;
  struct stream *origin;
  unsigned long nodes;
} capture;
typedef struct stream { capture *capturing; unsigned long work; int unjoined; int blocking; } stream;
typedef struct { capture *capturing; stream *recorded_in; unsigned long work, reset; } event;
typedef struct { unsigned long nodes; } graph;

static stream legacy = {.blocking = 1};
static capture *captures[64]; /* open ones */
static unsigned long long num_captures;
static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
static __thread cudaError_t last_error;

static stream *stream_of(const void *handle) {
  /* 1 and 2 name the legacy and the per-thread default stream */
  return (unsigned long)handle <= 2 ? &legacy : (stream *)handle;
}
static capture *capture_of(const void *handle) {
  capture *found = stream_of(handle)->capturing;
  return found && found->open ? found : 0;
}
static cudaError_t failed(cudaError_t error) { return last_error = error; }
static cudaError_t refused(capture *of, cudaError_t error) {
  of->broken = 1;
  tell(REFUSAL, "refused while capturing", error);
  return failed(error);
}
/* What CUDA calls potentially unsafe: refused while this thread captures, or another does so in
 * global mode, unless this thread's mode is relaxed. */
static cudaError_t unsafe(void) {
  if (thread_mode == cudaStreamCaptureModeRelaxed) return 0;
  for (int i = 0; i < 64; i++) {
    capture *of = captures[i];
    if (!of || of->mode == cudaStreamCaptureModeRelaxed) continue;
    int own = pthread_equal(of->thread, pthread_self());
    int global = of->mode == cudaStreamCaptureModeGlobal;
    if (own || (global && thread_mode == cudaStreamCaptureModeGlobal))
      return refused(of, cudaErrorStreamCaptureUnsupported);
  }
  return 0;
}
static int anybody_captures(void) {
  for (int i = 0; i < 64; i++)
    if (captures[i]) return 1;
  return 0;
}
/* Every operation on the device comes through here. Returns 1 if it becomes a node of a graph. */
static int enqueued(const void *handle, cudaError_t *error) {
  capture *of = capture_of(handle);
  stream *in = stream_of(handle);
  in->work++;
  *error = 0;
  if (!of) {
    if (anybody_captures()) null_beside_capture++;
    return 0;
  }
  if (of->broken) *error = failed(cudaErrorStreamCaptureInvalidated);
  in->unjoined = in != of->origin;
  of->nodes++, null_captured++;
  return 1;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) {
  stream *made = calloc(1, sizeof *made);
  made->blocking = !(flags & cudaStreamNonBlocking);
  *s = (cudaStream_t)made;
  return 0;
}
cudaError_t cudaStreamCreate(cudaStream_t *s) { return cudaStreamCreateWithPriority(s, 0, 0); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) {
  return cudaStreamCreateWithPriority(s, flags, 0);
}
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *priority) { *priority = 0; return 0; }
cudaError_t cudaStreamSynchronize(cudaStream_t s) {
  capture *of = capture_of(s);
  if (of) return refused(of, cudaErrorStreamCaptureUnsupported);
  cudaError_t error = unsafe();
  if (error) return error;
  null_stream_waits++;
  tell(WAIT, "wait for a stream", 0);
  return 0;
}
cudaError_t cudaStreamQuery(cudaStream_t s) {
  capture *of = capture_of(s);
  return of ? refused(of, cudaErrorStreamCaptureUnsupported) : unsafe();
}
cudaError_t cudaDeviceSynchronize(void) {
  cudaError_t error = unsafe();
  if (error) return error;
  null_device_waits++;
  tell(WAIT, "wait for the device", 0);
  return 0;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) {
  capture *of = capture_of(s);
  *status = !of ? cudaStreamCaptureStatusNone
            : of->broken ? cudaStreamCaptureStatusInvalidated
                         : cudaStreamCaptureStatusActive;
  return 0;
}
cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *g,
    const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *count) {
  capture *of = capture_of(s);
  cudaStreamIsCapturing(s, status);
  if (id) *id = of ? of->id : 0;
  if (g) *g = (cudaGraph_t)of;
  if (nodes) *nodes = 0;
  if (edges) *edges = 0;
  if (count) *count = 0;
  return 0;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
  enum cudaStreamCaptureMode before = thread_mode;
  thread_mode = *mode;
  *mode = before;
  return 0;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode mode) {
  stream *origin = stream_of(s);
  if (origin == &legacy || capture_of(s)) return failed(cudaErrorStreamCaptureUnsupported);
  capture *made = calloc(1, sizeof *made);
  *made = (capture){.open = 1, .id = ++num_captures, .mode = mode, .thread = pthread_self(),
                    .origin = origin};
  origin->capturing = made;
  origin->unjoined = 0;
  captures[made->id % 64] = made;
  return 0;
}
cudaError_t cudaStreamBeginCaptureToGraph(
    cudaStream_t s, cudaGraph_t g, const cudaGraphNode_t *nodes, const cudaGraphEdgeData *edges,
    size_t count, enum cudaStreamCaptureMode mode) {
  return cudaStreamBeginCapture(s, mode);
}
static stream *joined[1 << 12]; /* streams that have joined a capture by an event */
static int num_joined;
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *g) {
  capture *of = capture_of(s);
  *g = 0;
  if (!of) return failed(cudaErrorIllegalState);
  if (of->origin != stream_of(s)) return refused(of, cudaErrorStreamCaptureUnmatched);
  if (of->mode != cudaStreamCaptureModeRelaxed && !pthread_equal(of->thread, pthread_self()))
    return refused(of, cudaErrorStreamCaptureWrongThread);
  cudaError_t error = of->broken ? cudaErrorStreamCaptureInvalidated : 0;
  for (int i = 0; i < num_joined; i++)
    if (joined[i]->capturing == of) {
      if (joined[i]->unjoined && !error) error = cudaErrorStreamCaptureUnjoined;
      joined[i]->capturing = 0;
      joined[i--] = joined[--num_joined];
    }
  of->open = 0; /* never freed: an event may still name it */
  of->origin->capturing = 0;
  captures[of->id % 64] = 0;
  if (error) return failed(error);
  graph *made = calloc(1, sizeof *made);
  made->nodes = of->nodes;
  *g = (cudaGraph_t)made;
  return 0;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t *nodes, size_t *count) {
  *count = ((graph *)g)->nodes;
  return 0;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *made, cudaGraph_t g, unsigned long long flags) {
  cudaError_t error = unsafe();
  if (error) return error;
  graph *copy = calloc(1, sizeof *copy);
  *copy = *(graph *)g;
  *made = (cudaGraphExec_t)copy;
  return 0;
}
cudaError_t cudaGraphInstantiateWithFlags(
    cudaGraphExec_t *made, cudaGraph_t g, unsigned long long flags) {
  return cudaGraphInstantiate(made, g, flags);
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t g, cudaStream_t s) {
  cudaError_t error;
  if (enqueued(s, &error)) return error;
  null_graph_launches++;
  null_graph_nodes += ((graph *)g)->nodes;
  tell(OPERATION, "graph", 0);
  return 0;
}
cudaError_t cudaGraphDestroy(cudaGraph_t g) { free(g); return 0; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t g) { free(g); return 0; }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) {
  *e = calloc(1, sizeof(event));
  return 0;
}
cudaError_t cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t e) { free(e); return 0; }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  *(event *)e = (event){capture_of(s), stream_of(s), stream_of(s)->work, resets};
  return 0;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned flags) {
  return cudaEventRecord(e, s);
}
static cudaError_t asked(cudaEvent_t e) {
  capture *of = ((event *)e)->capturing;
  return of && of->open ? refused(of, cudaErrorCapturedEvent) : unsafe();
}
cudaError_t cudaEventQuery(cudaEvent_t e) { return asked(e); }
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
  cudaError_t error = asked(e);
  if (error) return error;
  if (((event *)e)->reset != resets) null_earlier_event_waits++;
  else null_event_waits++, tell(WAIT, "wait for an event", 0);
  return 0;
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) { *ms = 0.001f; return 0; }
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned flags) {
  stream *waits = stream_of(s);
  event *passed = (event *)e;
  capture *from = passed->capturing && passed->capturing->open ? passed->capturing : 0;
  capture *of = capture_of(s);
  if (of && passed->recorded_in && from != of && !(flags & cudaEventWaitExternal))
    return refused(of, cudaErrorStreamCaptureIsolation);
  if (!from) return 0;
  if (waits == &legacy) return refused(from, cudaErrorStreamCaptureImplicit);
  if (!of) { /* the stream joins the capture */
    waits->capturing = from;
    joined[num_joined++] = waits;
  }
  if (waits != from->origin) waits->unjoined = 1;
  if (passed->recorded_in->work == passed->work && passed->recorded_in != waits)
    passed->recorded_in->unjoined = 0;
  return 0;
}

/* --- memory -------------------------------------------------------------------------------------*/

enum { PAGEABLE, PINNED, DEVICE, REGISTERED };
typedef struct { char *start; size_t bytes; int kind; } block;
static block blocks[1 << 16];
static int num_blocks;
static void *mapped(size_t bytes, int kind) {
  size_t size = bytes ? (bytes + 0x1fffff) & ~0x1ffffful : 0x200000;
  void *start = mmap(0, size, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  pthread_mutex_lock(&lock);
  blocks[num_blocks++] = (block){start, size, kind};
  pthread_mutex_unlock(&lock);
  return start;
}
static block *block_at(const void *address) {
  const char *a = address;
  for (int i = 0; i < num_blocks; i++)
    if (a >= blocks[i].start && a < blocks[i].start + blocks[i].bytes) return blocks + i;
  return 0;
}
static int kind_of(const void *address) {
  pthread_mutex_lock(&lock);
  block *found = block_at(address);
  int kind = found ? found->kind : PAGEABLE;
  pthread_mutex_unlock(&lock);
  return kind;
}
static int forget(const void *start, int unmap) {
  pthread_mutex_lock(&lock);
  int i = 0;
  while (i < num_blocks && blocks[i].start != start) i++;
  int found = i < num_blocks;
  if (found) {
    if (unmap) munmap(blocks[i].start, blocks[i].bytes);
    blocks[i] = blocks[--num_blocks];
  }
  pthread_mutex_unlock(&lock);
  return found;
}
cudaError_t cudaMalloc(void **p, size_t bytes) {
  cudaError_t error = unsafe();
  if (error) return error;
  null_mallocs++;
  tell(MEMORY, "cudaMalloc", bytes);
  *p = mapped(bytes, DEVICE);
  return 0;
}
cudaError_t cudaMallocAsync(void **p, size_t bytes, cudaStream_t s) {
  *p = mapped(bytes, DEVICE);
  return 0;
}
cudaError_t cudaMallocManaged(void **p, size_t bytes, unsigned flags) { return cudaMalloc(p, bytes); }
cudaError_t cudaFree(void *p) {
  cudaError_t error = p ? unsafe() : 0;
  if (error) return error;
  if (p) forget(p, 1);
  return 0;
}
cudaError_t cudaFreeAsync(void *p, cudaStream_t s) { if (p) forget(p, 1); return 0; }
cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned flags) {
  cudaError_t error = unsafe();
  if (error) return error;
  null_host_allocs++;
  *p = mapped(bytes, PINNED);
  return 0;
}
cudaError_t cudaMallocHost(void **p, size_t bytes) { return cudaHostAlloc(p, bytes, 0); }
cudaError_t cudaFreeHost(void *p) {
  cudaError_t error = p ? unsafe() : 0;
  if (error) return error;
  if (p) forget(p, 1);
  return 0;
}
cudaError_t cudaHostRegister(void *p, size_t bytes, unsigned flags) {
  cudaError_t error = unsafe();
  if (error) return error;
  if (kind_of(p) != PAGEABLE || kind_of((char *)p + bytes - 1) != PAGEABLE)
    return failed(cudaErrorHostMemoryAlreadyRegistered);
  pthread_mutex_lock(&lock);
  blocks[num_blocks++] = (block){p, bytes, REGISTERED};
  pthread_mutex_unlock(&lock);
  return 0;
}
cudaError_t cudaHostUnregister(void *p) {
  cudaError_t error = unsafe();
  if (error) return error;
  if (kind_of(p) != REGISTERED || !forget(p, 0)) return failed(cudaErrorHostMemoryNotRegistered);
  return 0;
}
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *all) {
  *all = 80ul << 30;
  *free_bytes = 79ul << 30;
  return 0;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  memset(a, 0, sizeof *a);
  int kind = kind_of(p);
  a->type = kind == DEVICE ? cudaMemoryTypeDevice
            : kind         ? cudaMemoryTypeHost
                           : cudaMemoryTypeUnregistered;
  a->devicePointer = (void *)p;
  a->hostPointer = kind == DEVICE ? 0 : (void *)p;
  return 0;
}
static void read_back(void *to, const void *from, size_t bytes) {
  if (null_keep) memcpy(to, from, bytes);
  else memset(to, 0, bytes);
}
cudaError_t cudaMemcpyAsync(
    void *to, const void *from, size_t bytes, enum cudaMemcpyKind direction, cudaStream_t s) {
  int to_device = kind_of(to) == DEVICE, from_device = kind_of(from) == DEVICE;
  int host = to_device ? kind_of(from) : kind_of(to);
  capture *of = capture_of(s);
  if (of && !(to_device && from_device) && host == PAGEABLE)
    return refused(of, cudaErrorStreamCaptureUnsupported);
  cudaError_t error;
  if (enqueued(s, &error)) return error;
  if (to_device && from_device) { /* not done: it would cost the host time and pages */
    null_device_copies++;
    tell(OPERATION, "copy on the device", bytes);
  } else if (to_device) {
    null_bytes_to_device += bytes;
    if (host == PAGEABLE) null_pageable_copies++, tell(PAGEABLE_COPY, "pageable copy to the device", bytes);
    else null_pinned_copies++, tell(HOST_COPY, "pinned copy to the device", bytes);
    memcpy(to, from, bytes);
  } else {
    null_copies_to_host++, null_bytes_to_host += bytes;
    if (host == PAGEABLE) null_pageable_to_host++, tell(PAGEABLE_COPY, "pageable copy to the host", bytes);
    else tell(HOST_COPY, "pinned copy to the host", bytes);
    read_back(to, from, bytes);
  }
  return 0;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind direction) {
  cudaError_t error = unsafe();
  if (error) return error;
  null_blocking_copies++;
  tell(WAIT, "blocking copy", bytes);
  if (kind_of(to) == DEVICE && kind_of(from) == DEVICE) return 0;
  if (kind_of(to) == DEVICE) memcpy(to, from, bytes);
  else read_back(to, from, bytes);
  return 0;
}
cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t s) {
  cudaError_t error;
  if (enqueued(s, &error)) return error;
  null_fills++;
  tell(OPERATION, "fill", bytes);
  return 0;
}
cudaError_t cudaMemset(void *p, int value, size_t bytes) { return cudaMemsetAsync(p, value, bytes, 0); }

/* --- kernels ------------------------------------------------------------------------------------*/

static cudaError_t launched(const void *key, const void *handle) {
  cudaError_t error;
  int node = enqueued(handle, &error);
  if (error) return error;
  pthread_mutex_lock(&lock);
  kernel *found = kernel_of(key);
  if (!node) null_launches++, found->launches++;
  const char *name = found->name;
  pthread_mutex_unlock(&lock);
  if (!node) tell(OPERATION, name ? name : "kernel", 0);
  return 0;
}
/* A launch whose kernel is known by name alone: cuBLAS, NCCL, and the convolutions of Python. */
int null_launch(const char *name, const void *handle) { return launched(name, handle); }
void null_name(const char *name) { name_kernel(name, name); }

static __thread struct { dim3 grid, threads; size_t memory; cudaStream_t stream; } configured[8];
static __thread int depth;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 threads, size_t memory, struct CUstream_st *s) {
  configured[depth].grid = grid;
  configured[depth].threads = threads;
  configured[depth].memory = memory;
  configured[depth++].stream = s;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *threads, size_t *memory, void *s) {
  depth--;
  *grid = configured[depth].grid;
  *threads = configured[depth].threads;
  *memory = configured[depth].memory;
  *(cudaStream_t *)s = configured[depth].stream;
  return 0;
}
static void *fat_binary[4];
void **__cudaRegisterFatBinary(void *binary) { return fat_binary; }
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
void __cudaRegisterVar(void **h, char *v, char *a, const char *n, int e, size_t s, int c, int g) {}
void __cudaRegisterFunction(void **h, const char *function, char *device, const char *name, int l,
                            void *t, void *b, void *bd, void *gd, int *w) {
  name_kernel(function, name);
}
cudaError_t __cudaGetKernel(cudaKernel_t *k, const void *f) { *k = (cudaKernel_t)f; return 0; }
cudaError_t cudaLaunchKernel(const void *f, dim3 g, dim3 t, void **a, size_t m, cudaStream_t s) {
  return launched(f, s);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t k, dim3 g, dim3 t, void **a, size_t m, cudaStream_t s) {
  return launched(k, s);
}
cudaError_t cudaLaunchCooperativeKernel(
    const void *f, dim3 g, dim3 t, void **a, size_t m, cudaStream_t s) {
  return launched(f, s);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **a) {
  return launched(f, c->stream);
}
cudaError_t cudaGetLastError(void) {
  cudaError_t error = last_error;
  last_error = 0;
  return error;
}
cudaError_t cudaPeekAtLastError(void) { return last_error; }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->binaryVersion = a->ptxVersion = 90;
  a->maxDynamicSharedSizeBytes = 232448;
  return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int b, size_t m) {
  *n = 2;
  return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *n, const void *f, int b, size_t m, unsigned flags) {
  *n = 2;
  return 0;
}
static char symbol[1 << 16];
cudaError_t cudaGetSymbolAddress(void **p, const void *s) { *p = symbol; return 0; }
static int nothing(void) { return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(
    const char *name, void **f, unsigned v, unsigned long long flags,
    enum cudaDriverEntryPointQueryResult *result) {
  *f = dlsym(RTLD_DEFAULT, name);
  if (!*f) *f = nothing;
  if (result) *result = 0;
  return 0;
}

/* --- devices: an H100 ---------------------------------------------------------------------------*/

static __thread int current;
static int devices(void) { char *n = getenv("NULL_CUDA_DEVICES"); return n ? atoi(n) : 1; }
cudaError_t cudaGetDeviceCount(int *n) { *n = devices(); return 0; }
cudaError_t cudaGetDevice(int *d) { *d = current; return 0; }
cudaError_t cudaSetDevice(int d) {
  if (d < 0 || d >= devices()) return failed(cudaErrorInvalidDevice);
  current = d;
  return 0;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "null H100");
  p->totalGlobalMem = 80ul << 30;
  p->major = 9;
  p->pciBusID = d;  // as cudaDeviceGetPCIBusId says it
  p->multiProcessorCount = 132;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = 232448;
  p->sharedMemPerMultiprocessor = 233472;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->l2CacheSize = 50 << 20;
  p->memoryBusWidth = 5120;
  p->maxGridSize[0] = 0x7fffffff;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->totalConstMem = 65536;
  p->unifiedAddressing = p->canMapHostMemory = p->concurrentKernels = p->ECCEnabled = 1;
  p->asyncEngineCount = 3;
  p->textureAlignment = 512;
  return 0;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int d) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 233472; break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 65536; break;
    case cudaDevAttrMaxGridDimX: *value = 0x7fffffff; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    case cudaDevAttrMaxBlockDimZ: *value = 64; break;
    case cudaDevAttrL2CacheSize: *value = 50 << 20; break;
    default: *value = 0;
  }
  return 0;
}
cudaError_t cudaDeviceGetPCIBusId(char *id, int n, int d) { snprintf(id, n, "0000:%02x:00.0", d); return 0; }
cudaError_t cudaDeviceCanAccessPeer(int *yes, int a, int b) { *yes = 1; return 0; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return 0;
}
cudaError_t cudaDriverGetVersion(int *v) { *v = 13020; return 0; }
cudaError_t cudaRuntimeGetVersion(int *v) { *v = 13020; return 0; }
const char *cudaGetErrorString(cudaError_t error) {
  switch ((int)error) {
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureUnmatched: return "capture was not initiated in this stream";
    case cudaErrorStreamCaptureUnjoined: return "capturing stream has unjoined work";
    case cudaErrorStreamCaptureIsolation: return "dependency created on uncaptured work in another stream";
    case cudaErrorStreamCaptureImplicit: return "operation would make the legacy stream depend on a capturing blocking stream";
    case cudaErrorCapturedEvent: return "operation not permitted on an event last recorded in a capturing stream";
    case cudaErrorStreamCaptureWrongThread: return "attempt to terminate a thread-local capture sequence from another thread";
    case cudaErrorHostMemoryAlreadyRegistered: return "part or all of the requested memory range is already mapped";
    case cudaErrorHostMemoryNotRegistered: return "pointer does not correspond to a registered memory region";
    default: return "null CUDA";
  }
}
const char *cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }

/* --- cuBLAS: a handle is where its stream is kept -------------------------------------------------*/

int cublasCreate_v2(void **handle) { *handle = calloc(1, 64); return 0; }
int cublasSetStream_v2(void **handle, void *s) { *handle = s; return 0; }
int cublasGetMathMode(void *h, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *h, int *mode) { *mode = 0; return 0; }
static int product(const char *name, void **handle) {
  null_products++;
  null_name(name);
  return launched(name, handle ? *handle : 0) ? 13 : 0;
}
#define PRODUCT(name) int name(void **handle) { return product(#name, handle); }
PRODUCT(cublasGemmEx) PRODUCT(cublasGemmStridedBatchedEx) PRODUCT(cublasSgemmEx)
PRODUCT(cublasSgemv_v2) PRODUCT(cublasDgemm_v2) PRODUCT(cublasSdot_v2) PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgemmStridedBatched)
int cublasLtMatmul(void *h, void *d, void *alpha, void *a, void *la, void *b, void *lb, void *beta,
                   void *c, void *lc, void *out, void *lout, void *algorithm, void *workspace,
                   size_t bytes, void *s) {
  return product("cublasLtMatmul", &s);
}
static int made(void **p) { *p = calloc(1, 64); return 0; }
int cublasLtMatmulDescCreate(void **p) { return made(p); }
int cublasLtMatrixLayoutCreate(void **p) { return made(p); }
int cublasLtMatmulPreferenceCreate(void **p) { return made(p); }
int cublasLtMatmulAlgoGetHeuristic(void *h, void *op, void *a, void *b, void *c, void *d, void *p,
                                   int wanted, void *results, int *found) {
  memset(results, 0, 80);
  *found = 1;
  return 0;
}
int cudnnCreate(void **handle) { return made(handle); } /* null_cuda.py has the convolutions */

/* --- NCCL: a world in which everybody has sent zeros ----------------------------------------------*/

typedef struct { char bytes[128]; } nccl_id;
int ncclGetUniqueId(void *id) { memset(id, 7, 128); return 0; }
int ncclCommInitRankConfig(void **c, int n, nccl_id id, int rank, void *config) {
  int *communicator = calloc(1, 64);
  communicator[0] = n;
  communicator[1] = rank;
  *c = communicator;
  return 0;
}
int ncclCommInitRank(void **c, int n, nccl_id id, int rank) {
  return ncclCommInitRankConfig(c, n, id, rank, 0);
}
int ncclCommInitRankScalable(void **c) { return made(c); }
int ncclCommSplit(void *c, int colour, int key, void **new, void *config) { return made(new); }
int ncclCommGetAsyncError(void *c, int *e) { *e = 0; return 0; }
int ncclCommCount(void *c, int *n) { *n = *(int *)c; return 0; }
int ncclCommUserRank(void *c, int *rank) { *rank = ((int *)c)[1]; return 0; }
const char *ncclGetErrorString(int e) { return "null NCCL"; }
const char *ncclGetLastError(void *c) { return "null NCCL"; }
static int collective(const char *name, void *s) {
  null_collectives++;
  null_name(name);
  return launched(name, s) != 0;
}
int ncclAllReduce(void *a, void *b, size_t n, int t, int o, void *c, void *s) {
  return collective("ncclAllReduce", s);
}
int ncclBroadcast(void *a, void *b, size_t n, int t, int root, void *c, void *s) {
  return collective("ncclBroadcast", s);
}
int ncclBcast(void *a, size_t n, int t, int root, void *c, void *s) {
  return collective("ncclBcast", s);
}
int ncclAllGather(void *a, void *b, size_t n, int t, void *c, void *s) {
  return collective("ncclAllGather", s);
}
int ncclReduce(void *a, void *b, size_t n, int t, int o, int root, void *c, void *s) {
  return collective("ncclReduce", s);
}
int ncclReduceScatter(void *a, void *b, size_t n, int t, int o, void *c, void *s) {
  return collective("ncclReduceScatter", s);
}

/* --- the driver, for Triton and Inductor ----------------------------------------------------------*/

static int context;
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *v) { *v = 13020; return 0; }
int cuDeviceGetCount(int *n) { *n = devices(); return 0; }
int cuDeviceGet(int *d, int ordinal) { *d = ordinal; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int d) {
  return cudaDeviceGetAttribute(value, attribute, d); /* both number them alike */
}
int cuDevicePrimaryCtxGetState(int d, unsigned *flags, int *active) {
  *flags = 0;
  *active = 1;
  return 0;
}
int cuDevicePrimaryCtxRetain(void **c, int d) { *c = &context; return 0; }
int cuCtxGetCurrent(void **c) { *c = &context; return 0; }
int cuCtxGetDevice(int *d) { *d = current; return 0; }
int cuGetErrorString(int error, const char **s) { *s = cudaGetErrorString(error); return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *f) {
  *value = attribute == 0 ? 1024 : attribute == 4 ? 32 : 0; /* threads of a block, registers */
  return 0;
}
int cuModuleLoadData(void **module, const void *image) { return made(module); }
int cuModuleGetFunction(void **f, void *module, const char *name) {
  made(f);
  name_kernel(*f, strdup(name));
  return 0;
}
int cuPointerGetAttribute(void *value, int attribute, unsigned long p) {
  *(unsigned long *)value = p;
  return 0;
}
int cuStreamIsCapturing(void *s, int *status) {
  return cudaStreamIsCapturing(s, (enum cudaStreamCaptureStatus *)status);
}
int cuOccupancyMaxActiveClusters(int *n, void *f, void *config) { *n = 1; return 0; }
static int launched_by_driver(void *f, void *s) {
  if (!capture_of(s)) null_triton++;
  return launched(f, s);
}
int cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned tx, unsigned ty,
                   unsigned tz, unsigned memory, void *s, void **a, void **extra) {
  return launched_by_driver(f, s);
}
int cuLaunchCooperativeKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned tx,
                              unsigned ty, unsigned tz, unsigned memory, void *s, void **a) {
  return launched_by_driver(f, s);
}
typedef struct { unsigned grid[3], threads[3], memory; void *stream; } driver_config; /* as CUlaunchConfig begins */
int cuLaunchKernelEx(driver_config *c, void *f, void **a, void **extra) {
  return launched_by_driver(f, c->stream);
}
int cuMemGetAddressRange_v2(unsigned long *start, size_t *bytes, unsigned long p) {
  block *found = block_at((void *)p);
  if (found) *start = (unsigned long)found->start, *bytes = found->bytes;
  return 0;
}
int cuMemGetAddressRange(unsigned long *start, size_t *bytes, unsigned long p) {
  return cuMemGetAddressRange_v2(start, bytes, p);
}
