/* What the three files of the test NPU share. See npu.c for what it is. */
#ifndef LLAMAJAX_TEST_NPU_H_
#define LLAMAJAX_TEST_NPU_H_

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "pjrt_c_api.h"

/* The options of the client, typed as PJRT named values. An operation is named as in StableHLO
 * (dot_general, all_reduce, ...); "" means none, and several are joined by +. */
typedef struct {
  int64_t num_devices;      /* int */
  char kind[64];            /* string: device_kind */
  double memory_gib;        /* float: limit of one device, 0: none */
  bool memory_stats;        /* bool: false answers UNIMPLEMENTED */
  bool float64;             /* bool: false refuses arrays and programs of float64 */
  bool asynchronous;        /* bool: false makes every execution wait for its results */
  char donation[16];        /* string: honor, ignore (no aliasing) or refuse (an error) */
  char newest_program[24];  /* string: newest StableHLO version taken, such as 1.9.0 */
  char refuse[256];         /* string: operations that do not compile */
  char wrong[256];          /* string: operations whose programs return wrong numbers */
  char wrong_matmul[16];    /* string: bfloat16 or float32, whose products are wrong */
  char hang[256];           /* string: operations whose programs never end */
  char crash[256];          /* string: operations whose programs abort the process */
  int64_t fail_after;       /* int: executions that succeed, -1: all */
  int64_t hang_after;
  int64_t crash_after;
} Options;

extern Options options;
extern const PJRT_Api* backing; /* the real plugin behind this one */

/* npu.c: a real error object of the backing plugin, with this code and message. */
PJRT_Error* fail(PJRT_Error_Code code, const char* format, ...);

/* memory.c */
PJRT_Error* memory_track(PJRT_Buffer* buffer);
void memory_forget(PJRT_Buffer* buffer);
PJRT_Error* memory_fits(PJRT_LoadedExecutable* executable);
void memory_install(PJRT_Api* api);

/* faults.c */
bool faults_have_donation_mode(void);
void faults_install(PJRT_Api* api);

#define ARGS(type, name) \
  type##_Args name;      \
  memset(&name, 0, sizeof name); \
  name.struct_size = type##_Args_STRUCT_SIZE

#endif
