/* The memory of the test NPU: what lives on each device, and a limit to it.
 *
 * Counted are the buffers themselves, whatever made them; the temporaries of a program count when
 * it is loaded, against the limit only, as a TPU's compiler does it.
 */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "npu.h"

#define BUCKETS 65536
#define DEVICES 4096

typedef struct Live {
  PJRT_Buffer* buffer;
  PJRT_Device* device;
  int64_t bytes;
  struct Live* next;
} Live;

static Live* live[BUCKETS];
static struct {
  PJRT_Device* device;
  int64_t in_use, peak, allocations;
} usage[DEVICES];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static size_t bucket_of(const PJRT_Buffer* buffer) { return ((uintptr_t)buffer >> 4) % BUCKETS; }

static size_t place_of(PJRT_Device* device) {
  size_t i = 0;
  while (usage[i].device && usage[i].device != device)
    if (++i == DEVICES) abort();
  usage[i].device = device;
  return i;
}

static int64_t limit_bytes(void) { return (int64_t)(options.memory_gib * 1073741824.0); }

void memory_forget(PJRT_Buffer* buffer) {
  pthread_mutex_lock(&lock);
  for (Live** place = &live[bucket_of(buffer)]; *place; place = &(*place)->next) {
    if ((*place)->buffer == buffer) {
      Live* gone = *place;
      usage[place_of(gone->device)].in_use -= gone->bytes;
      *place = gone->next;
      free(gone);
      break;
    }
  }
  pthread_mutex_unlock(&lock);
}

PJRT_Error* memory_track(PJRT_Buffer* buffer) {
  ARGS(PJRT_Buffer_OnDeviceSizeInBytes, size);
  size.buffer = buffer;
  PJRT_Error* error = backing->PJRT_Buffer_OnDeviceSizeInBytes(&size);
  if (error) return error;
  ARGS(PJRT_Buffer_Device, where);
  where.buffer = buffer;
  error = backing->PJRT_Buffer_Device(&where);
  if (error) return error;
  memory_forget(buffer); /* an address that is used again */
  Live* entry = calloc(1, sizeof *entry);
  if (!entry) abort();
  *entry = (Live){buffer, where.device, (int64_t)size.on_device_size_in_bytes, NULL};
  pthread_mutex_lock(&lock);
  entry->next = live[bucket_of(buffer)];
  live[bucket_of(buffer)] = entry;
  size_t i = place_of(where.device);
  usage[i].in_use += entry->bytes;
  usage[i].allocations++;
  if (usage[i].in_use > usage[i].peak) usage[i].peak = usage[i].in_use;
  int64_t in_use = usage[i].in_use;
  pthread_mutex_unlock(&lock);
  if (!limit_bytes() || in_use <= limit_bytes()) return NULL;
  memory_forget(buffer); /* whoever asked for it gets the error instead */
  return fail(PJRT_Error_Code_RESOURCE_EXHAUSTED,
              "out of memory: %lld bytes in use, the limit is %lld", (long long)in_use,
              (long long)limit_bytes());
}

PJRT_Error* memory_fits(PJRT_LoadedExecutable* loaded) {
  if (!limit_bytes()) return NULL;
  ARGS(PJRT_LoadedExecutable_GetExecutable, get);
  get.loaded_executable = loaded;
  PJRT_Error* error = backing->PJRT_LoadedExecutable_GetExecutable(&get);
  if (error) return error;
  ARGS(PJRT_Executable_GetCompiledMemoryStats, stats);
  stats.executable = get.executable;
  error = backing->PJRT_Executable_GetCompiledMemoryStats(&stats);
  ARGS(PJRT_Executable_Destroy, destroy);
  destroy.executable = get.executable;
  backing->PJRT_Executable_Destroy(&destroy);
  if (error) return error;
  int64_t bytes = stats.argument_size_in_bytes + stats.output_size_in_bytes +
                  stats.temp_size_in_bytes - stats.alias_size_in_bytes;
  if (bytes <= limit_bytes()) return NULL;
  return fail(PJRT_Error_Code_RESOURCE_EXHAUSTED,
              "program needs %lld bytes of device memory, the limit is %lld", (long long)bytes,
              (long long)limit_bytes());
}

static PJRT_Error* device_memory_stats(PJRT_Device_MemoryStats_Args* args) {
  if (!options.memory_stats)
    return fail(PJRT_Error_Code_UNIMPLEMENTED, "memory statistics are not implemented");
  size_t head = offsetof(PJRT_Device_MemoryStats_Args, bytes_in_use);
  memset((char*)args + head, 0, sizeof *args - head); /* the caller leaves the flags unset */
  pthread_mutex_lock(&lock);
  size_t i = place_of(args->device);
  args->bytes_in_use = usage[i].in_use;
  args->peak_bytes_in_use = usage[i].peak;
  args->num_allocs = usage[i].allocations;
  pthread_mutex_unlock(&lock);
  args->peak_bytes_in_use_is_set = true;
  args->num_allocs_is_set = true;
  args->bytes_limit = limit_bytes();
  args->bytes_limit_is_set = limit_bytes() > 0;
  return NULL;
}

/* The calls that make or end a buffer, each followed by its bookkeeping. */

static PJRT_Error* track_or(PJRT_Error* error, PJRT_Buffer* buffer) {
  return error ? error : memory_track(buffer);
}

static PJRT_Error* from_host(PJRT_Client_BufferFromHostBuffer_Args* args) {
  if (args->type == PJRT_Buffer_Type_F64 && !options.float64)
    return fail(PJRT_Error_Code_UNIMPLEMENTED, "float64 is not supported");
  PJRT_Error* error = backing->PJRT_Client_BufferFromHostBuffer(args);
  return track_or(error, args->buffer);
}

static PJRT_Error* uninitialized(PJRT_Client_CreateUninitializedBuffer_Args* args) {
  PJRT_Error* error = backing->PJRT_Client_CreateUninitializedBuffer(args);
  return track_or(error, args->buffer);
}

static PJRT_Error* to_device(PJRT_Buffer_CopyToDevice_Args* args) {
  PJRT_Error* error = backing->PJRT_Buffer_CopyToDevice(args);
  return track_or(error, args->dst_buffer);
}

static PJRT_Error* retrieve(PJRT_AsyncHostToDeviceTransferManager_RetrieveBuffer_Args* args) {
  PJRT_Error* error = backing->PJRT_AsyncHostToDeviceTransferManager_RetrieveBuffer(args);
  return track_or(error, args->buffer_out);
}

static PJRT_Error* destroy(PJRT_Buffer_Destroy_Args* args) {
  memory_forget(args->buffer);
  return backing->PJRT_Buffer_Destroy(args);
}

static PJRT_Error* delete(PJRT_Buffer_Delete_Args* args) {
  memory_forget(args->buffer);
  return backing->PJRT_Buffer_Delete(args);
}

void memory_install(PJRT_Api* api) {
  api->PJRT_Device_MemoryStats = device_memory_stats;
  api->PJRT_Client_BufferFromHostBuffer = from_host;
  api->PJRT_Client_CreateUninitializedBuffer = uninitialized;
  api->PJRT_Buffer_CopyToDevice = to_device;
  api->PJRT_AsyncHostToDeviceTransferManager_RetrieveBuffer = retrieve;
  api->PJRT_Buffer_Destroy = destroy;
  api->PJRT_Buffer_Delete = delete;
}
