/* A test NPU: a PJRT plugin with an identity, options, memory and faults of its own.
 *
 * It is a mask. Programs are compiled and run by a real CPU plugin (the macro BACKING names its
 * library), whose table of functions is copied and overridden here (names, options, errors), in
 * memory.c (a limit, statistics) and in faults.c (what goes wrong on purpose). What no override
 * touches behaves as on a CPU; several processes do not join. Every error is a real error object of
 * the backing plugin, to which this file remembers another code and message.
 */
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "npu.h"

#define PLATFORM "npu"
#define PLATFORM_VERSION "llamajax test NPU 1.0"

Options options;
const PJRT_Api* backing;
static union {
  PJRT_Api api;
  char room[8192]; /* a newer backing table is longer than the header's */
} table;

/* ---- errors ---- */

typedef struct Said {
  const PJRT_Error* error;
  PJRT_Error_Code code;
  char message[512];
  struct Said* next;
} Said;

static Said* said;
static pthread_mutex_t said_lock = PTHREAD_MUTEX_INITIALIZER;

PJRT_Error* fail(PJRT_Error_Code code, const char* format, ...) {
  ARGS(PJRT_Plugin_Attributes, attributes);
  attributes.struct_size = 0; /* a mistake on purpose: it gives an error object */
  PJRT_Error* error = backing->PJRT_Plugin_Attributes(&attributes);
  Said* entry = calloc(1, sizeof *entry);
  if (!error || !entry) abort();
  va_list list;
  va_start(list, format);
  vsnprintf(entry->message, sizeof entry->message, format, list);
  va_end(list);
  entry->error = error;
  entry->code = code;
  pthread_mutex_lock(&said_lock);
  entry->next = said;
  said = entry;
  pthread_mutex_unlock(&said_lock);
  return error;
}

static Said* find_said(const PJRT_Error* error) {
  pthread_mutex_lock(&said_lock);
  Said* entry = said;
  while (entry && entry->error != error) entry = entry->next;
  pthread_mutex_unlock(&said_lock);
  return entry;
}

static void error_message(PJRT_Error_Message_Args* args) {
  Said* entry = find_said(args->error);
  if (!entry) {
    backing->PJRT_Error_Message(args);
    return;
  }
  args->message = entry->message;
  args->message_size = strlen(entry->message);
}

static PJRT_Error* error_code(PJRT_Error_GetCode_Args* args) {
  Said* entry = find_said(args->error);
  if (!entry) return backing->PJRT_Error_GetCode(args);
  args->code = entry->code;
  return NULL;
}

static void error_destroy(PJRT_Error_Destroy_Args* args) {
  pthread_mutex_lock(&said_lock);
  for (Said** place = &said; *place; place = &(*place)->next) {
    if ((*place)->error == args->error) {
      Said* gone = *place;
      *place = gone->next;
      free(gone);
      break;
    }
  }
  pthread_mutex_unlock(&said_lock);
  backing->PJRT_Error_Destroy(args);
}

/* ---- options ---- */

typedef struct {
  const char* name;
  PJRT_NamedValue_Type type;
  void* target;
  size_t size; /* of a string's room */
} Option;

static const Option known[] = {
    {"num_devices", PJRT_NamedValue_kInt64, &options.num_devices, 0},
    {"device_kind", PJRT_NamedValue_kString, options.kind, sizeof options.kind},
    {"memory_gib", PJRT_NamedValue_kFloat, &options.memory_gib, 0},
    {"memory_stats", PJRT_NamedValue_kBool, &options.memory_stats, 0},
    {"float64", PJRT_NamedValue_kBool, &options.float64, 0},
    {"asynchronous", PJRT_NamedValue_kBool, &options.asynchronous, 0},
    {"donation", PJRT_NamedValue_kString, options.donation, sizeof options.donation},
    {"newest_program", PJRT_NamedValue_kString, options.newest_program,
     sizeof options.newest_program},
    {"refuse", PJRT_NamedValue_kString, options.refuse, sizeof options.refuse},
    {"wrong", PJRT_NamedValue_kString, options.wrong, sizeof options.wrong},
    {"wrong_matmul", PJRT_NamedValue_kString, options.wrong_matmul, sizeof options.wrong_matmul},
    {"hang", PJRT_NamedValue_kString, options.hang, sizeof options.hang},
    {"crash", PJRT_NamedValue_kString, options.crash, sizeof options.crash},
    {"fail_after", PJRT_NamedValue_kInt64, &options.fail_after, 0},
    {"hang_after", PJRT_NamedValue_kInt64, &options.hang_after, 0},
    {"crash_after", PJRT_NamedValue_kInt64, &options.crash_after, 0},
};
static const char* type_names[] = {"string", "int", "list of int", "float", "bool"};

static PJRT_Error* take(const PJRT_NamedValue* value) {
  char name[64];
  snprintf(name, sizeof name, "%.*s", (int)value->name_size, value->name);
  if (!strcmp(name, "node_id") || !strcmp(name, "num_nodes")) return NULL; /* taken, ignored */
  for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
    const Option* option = &known[i];
    if (strcmp(option->name, name)) continue;
    if (value->type != option->type)
      return fail(PJRT_Error_Code_INVALID_ARGUMENT, "option %s is of type %s, not %s", name,
                  type_names[option->type], type_names[value->type]);
    if (option->type == PJRT_NamedValue_kInt64) *(int64_t*)option->target = value->int64_value;
    if (option->type == PJRT_NamedValue_kFloat) *(double*)option->target = value->float_value;
    if (option->type == PJRT_NamedValue_kBool) *(bool*)option->target = value->bool_value;
    if (option->type == PJRT_NamedValue_kString)
      snprintf(option->target, option->size, "%.*s", (int)value->value_size, value->string_value);
    return NULL;
  }
  return fail(PJRT_Error_Code_INVALID_ARGUMENT, "the NPU has no option %s", name);
}

static void use_defaults(void) {
  options = (Options){.num_devices = 1, .kind = "Test NPU", .memory_stats = true, .float64 = true,
                      .asynchronous = true, .donation = "honor", .fail_after = -1,
                      .hang_after = -1, .crash_after = -1};
}

/* Calls the backing plugin for a client of that many devices. */
static PJRT_Error* create(PJRT_Client_Create_Args* args, int64_t num_devices) {
  PJRT_NamedValue count = {.struct_size = PJRT_NamedValue_STRUCT_SIZE};
  count.name = "cpu_device_count";
  count.name_size = strlen(count.name);
  count.type = PJRT_NamedValue_kInt64;
  count.int64_value = num_devices;
  count.value_size = 1;
  args->create_options = &count;
  args->num_options = 1;
  return backing->PJRT_Client_Create(args);
}

static PJRT_Error* client_create(PJRT_Client_Create_Args* args) {
  use_defaults();
  for (size_t i = 0; i < args->num_options; i++) {
    PJRT_Error* error = take(&args->create_options[i]);
    if (error) return error;
  }
  if (options.num_devices < 1)
    return fail(PJRT_Error_Code_NOT_FOUND, "no NPU was found on this host");
  if (!faults_have_donation_mode())
    return fail(PJRT_Error_Code_INVALID_ARGUMENT,
                "option donation is honor, ignore or refuse, not %s", options.donation);
  return create(args, options.num_devices);
}

/* ---- identity ---- */

static PJRT_Error* platform_name(PJRT_Client_PlatformName_Args* args) {
  args->platform_name = PLATFORM;
  args->platform_name_size = strlen(PLATFORM);
  return NULL;
}

static PJRT_Error* platform_version(PJRT_Client_PlatformVersion_Args* args) {
  args->platform_version = PLATFORM_VERSION;
  args->platform_version_size = strlen(PLATFORM_VERSION);
  return NULL;
}

/* Absent devices: the topology of a client that is kept for it. Its name is their number, an
 * empty one means as many as the client has. */
static PJRT_Error* topology_create(PJRT_TopologyDescription_Create_Args* args) {
  char name[16];
  snprintf(name, sizeof name, "%.*s", (int)args->topology_name_size, args->topology_name);
  if (!options.num_devices) use_defaults();
  int64_t num_devices = name[0] ? atoll(name) : options.num_devices;
  if (num_devices < 1 || num_devices > 4096)
    return fail(PJRT_Error_Code_INVALID_ARGUMENT, "topology %s is no number of NPUs", name);
  ARGS(PJRT_Client_Create, client);
  PJRT_Error* error = create(&client, num_devices);
  if (error) return error;
  ARGS(PJRT_Client_TopologyDescription, get);
  get.client = client.client;
  error = backing->PJRT_Client_TopologyDescription(&get);
  args->topology = get.topology;
  return error;
}

static PJRT_Error* topology_destroy(PJRT_TopologyDescription_Destroy_Args* args) {
  (void)args; /* it belongs to its client */
  return NULL;
}

static PJRT_Error* topology_name(PJRT_TopologyDescription_PlatformName_Args* args) {
  args->platform_name = PLATFORM;
  args->platform_name_size = strlen(PLATFORM);
  return NULL;
}

static PJRT_Error* topology_version(PJRT_TopologyDescription_PlatformVersion_Args* args) {
  args->platform_version = PLATFORM_VERSION;
  args->platform_version_size = strlen(PLATFORM_VERSION);
  return NULL;
}

static PJRT_Error* device_kind(PJRT_DeviceDescription_Kind_Args* args) {
  args->device_kind = options.kind[0] ? options.kind : "Test NPU";
  args->device_kind_size = strlen(args->device_kind);
  return NULL;
}

static const char* device_text(PJRT_DeviceDescription* description) {
  static char texts[4096][24];
  ARGS(PJRT_DeviceDescription_Id, id);
  id.device_description = description;
  if (backing->PJRT_DeviceDescription_Id(&id) || id.id < 0 || id.id >= 4096) return "NpuDevice";
  snprintf(texts[id.id], sizeof texts[id.id], "NpuDevice(id=%d)", id.id);
  return texts[id.id];
}

static PJRT_Error* device_debug_string(PJRT_DeviceDescription_DebugString_Args* args) {
  args->debug_string = device_text(args->device_description);
  args->debug_string_size = strlen(args->debug_string);
  return NULL;
}

static PJRT_Error* device_to_string(PJRT_DeviceDescription_ToString_Args* args) {
  args->to_string = device_text(args->device_description);
  args->to_string_size = strlen(args->to_string);
  return NULL;
}

const PJRT_Api* GetPjrtApi(void) {
  static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
  pthread_mutex_lock(&lock);
  if (!backing) {
    void* library = dlopen(BACKING, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
      fprintf(stderr, "test NPU: %s\n", dlerror());
      abort();
    }
    const PJRT_Api* (*get)(void);
    *(void**)&get = dlsym(library, "GetPjrtApi");
    backing = get();
    if (backing->struct_size > sizeof table) abort();
    memcpy(&table, backing, backing->struct_size);
    table.api.PJRT_Error_Destroy = error_destroy;
    table.api.PJRT_Error_Message = error_message;
    table.api.PJRT_Error_GetCode = error_code;
    table.api.PJRT_Client_Create = client_create;
    table.api.PJRT_Client_PlatformName = platform_name;
    table.api.PJRT_Client_PlatformVersion = platform_version;
    table.api.PJRT_TopologyDescription_Create = topology_create;
    table.api.PJRT_TopologyDescription_Destroy = topology_destroy;
    table.api.PJRT_TopologyDescription_PlatformName = topology_name;
    table.api.PJRT_TopologyDescription_PlatformVersion = topology_version;
    table.api.PJRT_DeviceDescription_Kind = device_kind;
    table.api.PJRT_DeviceDescription_DebugString = device_debug_string;
    table.api.PJRT_DeviceDescription_ToString = device_to_string;
    memory_install(&table.api);
    faults_install(&table.api);
  }
  pthread_mutex_unlock(&lock);
  return &table.api;
}
