/* What the test NPU does wrong, by option.
 *
 * A program is known by the names of its operations, which stand in the strings of its bytecode.
 * Faults of numbers change the results of whole programs that have the operation, after they ran:
 * every floating-point result becomes a quarter larger and every other one larger by one. The
 * operation itself is not changed inside its program; for a probe that runs one operation this is
 * the same. A program that was loaded from a cache has no operations to know it by, and no such
 * fault.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "npu.h"

typedef struct Program {
  PJRT_LoadedExecutable* executable;
  bool wrong, hangs, crashes, has_matmul;
  struct Program* next;
} Program;

static Program* programs;
static int64_t executions;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

bool faults_have_donation_mode(void) {
  return !strcmp(options.donation, "honor") || !strcmp(options.donation, "ignore") ||
         !strcmp(options.donation, "refuse");
}

static char* find(const char* code, size_t size, const char* text, size_t length) {
  return memmem(code, size, text, length);
}

/* Whether the program's bytecode has an operation of exactly this name, in whatever version. */
static bool has_operation(const PJRT_Program* program, const char* name, size_t length) {
  const char *at = program->code, *end = program->code + program->code_size;
  while ((at = find(at, (size_t)(end - at), name, length))) {
    const char* after = at + length;
    bool ends = after < end && (*after == 0 || (after + 2 < end && !strncmp(after, "_v", 2) &&
                                                after[2] >= '0' && after[2] <= '9'));
    if (at > program->code && (at[-1] == 0 || at[-1] == '.') && ends) return true;
    at = after;
  }
  return false;
}

/* The first of `names` (joined by +) that the program has, with its length; NULL if none. */
static const char* has_any(const PJRT_Program* program, const char* names, size_t* length) {
  while (*names) {
    *length = strcspn(names, "+");
    if (*length && has_operation(program, names, *length)) return names;
    names += *length + (names[*length] == '+');
  }
  return NULL;
}

static bool is_newer(const char* version, const char* than) {
  int a[3] = {0}, b[3] = {0};
  sscanf(version, "%d.%d.%d", &a[0], &a[1], &a[2]);
  sscanf(than, "%d.%d.%d", &b[0], &b[1], &b[2]);
  for (int i = 0; i < 3; i++)
    if (a[i] != b[i]) return a[i] > b[i];
  return false;
}

static PJRT_Error* refusal(const PJRT_Program* program) {
  size_t length = 0;
  const char* name = has_any(program, options.refuse, &length);
  if (name)
    return fail(PJRT_Error_Code_UNIMPLEMENTED, "operation %.*s is not supported", (int)length,
                name);
  static const char producer[] = "StableHLO_v";
  const char* version = find(program->code, program->code_size, producer, strlen(producer));
  if (version) version += strlen(producer);
  if (version && options.newest_program[0] && is_newer(version, options.newest_program))
    return fail(PJRT_Error_Code_INVALID_ARGUMENT,
                "program is StableHLO %.8s, the newest supported is %s", version,
                options.newest_program);
  bool donates = find(program->code, program->code_size, "tf.aliasing_output", 18) ||
                 find(program->code, program->code_size, "jax.buffer_donor", 16);
  if (donates && !strcmp(options.donation, "refuse"))
    return fail(PJRT_Error_Code_UNIMPLEMENTED, "donated arguments are not supported");
  return NULL;
}

/* The program with its donations renamed to what no compiler knows. */
static void ignore_donation(char* code, size_t size) {
  char* at;
  while ((at = find(code, size, "tf.aliasing_output", 18))) memcpy(at, "xx", 2);
  while ((at = find(code, size, "jax.buffer_donor", 16))) memcpy(at, "xxx", 3);
}

static PJRT_Error* output_types(PJRT_LoadedExecutable* loaded, bool* has_float64) {
  ARGS(PJRT_LoadedExecutable_GetExecutable, get);
  get.loaded_executable = loaded;
  PJRT_Error* error = backing->PJRT_LoadedExecutable_GetExecutable(&get);
  if (error) return error;
  ARGS(PJRT_Executable_OutputElementTypes, types);
  types.executable = get.executable;
  error = backing->PJRT_Executable_OutputElementTypes(&types);
  for (size_t i = 0; !error && i < types.num_output_types; i++)
    *has_float64 |= types.output_types[i] == PJRT_Buffer_Type_F64;
  ARGS(PJRT_Executable_Destroy, destroy);
  destroy.executable = get.executable;
  backing->PJRT_Executable_Destroy(&destroy);
  return error;
}

static PJRT_Error* check_loaded(PJRT_LoadedExecutable* loaded) {
  bool has_float64 = false;
  PJRT_Error* error = output_types(loaded, &has_float64);
  if (!error && has_float64 && !options.float64)
    error = fail(PJRT_Error_Code_UNIMPLEMENTED, "float64 is not supported");
  if (!error) error = memory_fits(loaded);
  if (error) {
    ARGS(PJRT_LoadedExecutable_Destroy, destroy);
    destroy.executable = loaded;
    backing->PJRT_LoadedExecutable_Destroy(&destroy);
  }
  return error;
}

static PJRT_Error* compile(PJRT_Client_Compile_Args* args) {
  PJRT_Error* error = refusal(args->program);
  if (error) return error;
  PJRT_Program program = *args->program;
  const PJRT_Program* given = args->program;
  char* copy = malloc(program.code_size);
  if (!copy) abort();
  memcpy(copy, program.code, program.code_size);
  if (!strcmp(options.donation, "ignore")) ignore_donation(copy, program.code_size);
  program.code = copy;
  args->program = &program;
  error = backing->PJRT_Client_Compile(args);
  args->program = given;
  if (!error) error = check_loaded(args->executable);
  if (!error) {
    size_t length = 0;
    Program* entry = calloc(1, sizeof *entry);
    if (!entry) abort();
    entry->executable = args->executable;
    entry->wrong = has_any(&program, options.wrong, &length);
    entry->hangs = has_any(&program, options.hang, &length);
    entry->crashes = has_any(&program, options.crash, &length);
    entry->has_matmul = has_operation(&program, "dot_general", strlen("dot_general"));
    pthread_mutex_lock(&lock);
    entry->next = programs;
    programs = entry;
    pthread_mutex_unlock(&lock);
  }
  free(copy);
  return error;
}

static PJRT_Error* load(PJRT_Executable_DeserializeAndLoad_Args* args) {
  PJRT_Error* error = backing->PJRT_Executable_DeserializeAndLoad(args);
  return error ? error : check_loaded(args->loaded_executable);
}

static PJRT_Error* unload(PJRT_LoadedExecutable_Destroy_Args* args) {
  pthread_mutex_lock(&lock);
  for (Program** place = &programs; *place; place = &(*place)->next) {
    if ((*place)->executable == args->executable) {
      Program* gone = *place;
      *place = gone->next;
      free(gone);
      break;
    }
  }
  pthread_mutex_unlock(&lock);
  return backing->PJRT_LoadedExecutable_Destroy(args);
}

/* ---- execution ---- */

static PJRT_Buffer_Type type_of(PJRT_Buffer* buffer) {
  ARGS(PJRT_Buffer_ElementType, type);
  type.buffer = buffer;
  return backing->PJRT_Buffer_ElementType(&type) ? PJRT_Buffer_Type_INVALID : type.type;
}

static PJRT_Error* await(PJRT_Buffer* buffer) {
  ARGS(PJRT_Buffer_ReadyEvent, ready);
  ready.buffer = buffer;
  PJRT_Error* error = backing->PJRT_Buffer_ReadyEvent(&ready);
  if (error) return error;
  ARGS(PJRT_Event_Await, wait);
  wait.event = ready.event;
  error = backing->PJRT_Event_Await(&wait);
  ARGS(PJRT_Event_Destroy, destroy);
  destroy.event = ready.event;
  backing->PJRT_Event_Destroy(&destroy);
  return error;
}

/* Every value larger: bfloat16 and float32 by a quarter, anything else by one in its first byte. */
static PJRT_Error* falsify(PJRT_Buffer* buffer) {
  ARGS(PJRT_Buffer_OnDeviceSizeInBytes, size);
  size.buffer = buffer;
  PJRT_Error* error = backing->PJRT_Buffer_OnDeviceSizeInBytes(&size);
  if (error) return error;
  ARGS(PJRT_Buffer_UnsafePointer, where);
  where.buffer = buffer;
  error = backing->PJRT_Buffer_UnsafePointer(&where);
  if (error) return error;
  PJRT_Buffer_Type type = type_of(buffer);
  size_t bytes = size.on_device_size_in_bytes;
  if (type == PJRT_Buffer_Type_F32) {
    float* values = (float*)where.buffer_pointer;
    for (size_t i = 0; i < bytes / 4; i++) values[i] *= 1.25f;
  } else if (type == PJRT_Buffer_Type_BF16) {
    uint16_t* values = (uint16_t*)where.buffer_pointer;
    for (size_t i = 0; i < bytes / 2; i++) {
      uint32_t bits = (uint32_t)values[i] << 16;
      float value;
      memcpy(&value, &bits, 4);
      value *= 1.25f;
      memcpy(&bits, &value, 4);
      values[i] = (uint16_t)(bits >> 16);
    }
  } else if (bytes) {
    *(unsigned char*)where.buffer_pointer += 1;
  }
  return NULL;
}

/* Whether the option names the type of this program's products: of an argument or a result. */
static bool multiplies_wrongly(PJRT_LoadedExecutable_Execute_Args* args, size_t num_outputs) {
  if (!options.wrong_matmul[0]) return false;
  PJRT_Buffer_Type wanted = !strcmp(options.wrong_matmul, "bfloat16") ? PJRT_Buffer_Type_BF16
                                                                      : PJRT_Buffer_Type_F32;
  for (size_t i = 0; i < num_outputs; i++)
    if (type_of(args->output_lists[0][i]) == wanted) return true;
  return false;
}

static Program what_is(PJRT_LoadedExecutable* executable, int64_t* count) {
  Program found = {0};
  pthread_mutex_lock(&lock);
  for (Program* entry = programs; entry; entry = entry->next)
    if (entry->executable == executable) found = *entry;
  *count = executions++;
  pthread_mutex_unlock(&lock);
  return found;
}

static bool is_over(int64_t count, int64_t limit) { return limit >= 0 && count >= limit; }

static PJRT_Error* num_outputs_of(PJRT_LoadedExecutable* loaded, size_t* count) {
  ARGS(PJRT_LoadedExecutable_GetExecutable, get);
  get.loaded_executable = loaded;
  PJRT_Error* error = backing->PJRT_LoadedExecutable_GetExecutable(&get);
  if (error) return error;
  ARGS(PJRT_Executable_NumOutputs, outputs);
  outputs.executable = get.executable;
  error = backing->PJRT_Executable_NumOutputs(&outputs);
  *count = outputs.num_outputs;
  ARGS(PJRT_Executable_Destroy, destroy);
  destroy.executable = get.executable;
  backing->PJRT_Executable_Destroy(&destroy);
  return error;
}

/* Donated arguments are gone once the program has started. */
static void forget_donated(PJRT_LoadedExecutable_Execute_Args* args) {
  for (size_t d = 0; d < args->num_devices; d++) {
    for (size_t i = 0; i < args->num_args; i++) {
      ARGS(PJRT_Buffer_IsDeleted, deleted);
      deleted.buffer = args->argument_lists[d][i];
      if (!backing->PJRT_Buffer_IsDeleted(&deleted) && deleted.is_deleted)
        memory_forget(args->argument_lists[d][i]);
    }
  }
}

static PJRT_Error* execute(PJRT_LoadedExecutable_Execute_Args* args) {
  int64_t count = 0;
  Program program = what_is(args->executable, &count);
  if (program.crashes || is_over(count, options.crash_after)) abort();
  while (program.hangs || is_over(count, options.hang_after)) pause();
  if (is_over(count, options.fail_after))
    return fail(PJRT_Error_Code_INTERNAL, "NPU error 507035: the vector core failed");
  size_t num_outputs = 0;
  PJRT_Error* error = num_outputs_of(args->executable, &num_outputs);
  if (error) return error;
  error = backing->PJRT_LoadedExecutable_Execute(args);
  if (error) return error;
  forget_donated(args);
  bool wrong = program.wrong ||
               (program.has_matmul && args->num_devices && multiplies_wrongly(args, num_outputs));
  for (size_t d = 0; d < args->num_devices && !error; d++) {
    for (size_t i = 0; i < num_outputs && !error; i++) {
      PJRT_Buffer* output = args->output_lists[d][i];
      error = memory_track(output);
      if (!error && (wrong || !options.asynchronous)) error = await(output);
      if (!error && wrong) error = falsify(output);
    }
  }
  return error;
}

void faults_install(PJRT_Api* api) {
  api->PJRT_Client_Compile = compile;
  api->PJRT_Executable_DeserializeAndLoad = load;
  api->PJRT_LoadedExecutable_Destroy = unload;
  api->PJRT_LoadedExecutable_Execute = execute;
}
