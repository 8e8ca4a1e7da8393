/* A libnvfm.so.1 for tests: what it answers is written in the file that MOCK_NVFM names, read anew for each call.
 *
 *   partition ID MODULE...      a partition and the module ids of its GPUs
 *   gone                        there is no manager: connections are not valid, and none can be made
 *   forgets                     connections made before are not valid (told once)
 *   fail FUNCTION CODE          FUNCTION answers CODE (nv_fm_types.h, fmReturn_t)
 *   hang FUNCTION               FUNCTION does not return while this line is there
 *   deaf                        activations are answered with success, and nothing is done
 *   many N                      says that there are N partitions, whatever it lists
 *
 * Which are active is in the file MOCK_NVFM.active, since a manager outlives who speaks with it. It holds every structure against
 * its own idea of its size and version. Built with -DVERSION=2 it expects other ones; with -DWITHOUT_LIST it cannot list.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))
#ifndef VERSION
#define VERSION 1
#endif
enum { OK = 0, BADPARAM = -1, UNINITIALIZED = -4, MISMATCH = -6, IN_USE = -7, NOT_VALID = -9 };
enum { GPUS = 16, PARTITIONS = 64 };

typedef struct { unsigned version; char address[256]; unsigned timeout_ms, is_unix; } connect_params;
typedef struct { unsigned physical_id; char uuid[80], bus_id[32]; unsigned links, links_max, rate; } gpu_info;
typedef struct { unsigned id, active, gpus; gpu_info gpu[GPUS]; } partition_info;
typedef struct { unsigned version, count, most; partition_info partition[PARTITIONS]; } partition_list;
#define VERSION_OF(type) (unsigned)(sizeof(type) | (VERSION << 24))

struct state { int failed, hangs, gone, forgets, deaf, many, count; struct { unsigned id, n, module[GPUS]; } partition[PARTITIONS]; };
static int initialized, connected, forgot;

static void load(struct state *s, const char *function) {
    char line[256];
    memset(s, 0, sizeof *s);
    FILE *file = getenv("MOCK_NVFM") ? fopen(getenv("MOCK_NVFM"), "r") : NULL;
    while (file && fgets(line, sizeof line, file)) {
        char name[64];
        int code, used;
        unsigned id, module;
        if (sscanf(line, "fail %63s %d", name, &code) == 2 && !strcmp(name, function)) s->failed = code;
        else if (sscanf(line, "hang %63s", name) == 1) s->hangs |= !strcmp(name, function);
        else if (!strncmp(line, "gone", 4)) s->gone = 1;
        else if (!strncmp(line, "forgets", 7)) s->forgets = 1;
        else if (!strncmp(line, "deaf", 4)) s->deaf = 1;
        else if (sscanf(line, "many %d", &code) == 1) s->many = code;
        else if (sscanf(line, "partition %u%n", &id, &used) == 1 && s->count < PARTITIONS) {
            s->partition[s->count].id = id;
            for (const char *at = line + used; sscanf(at, "%u%n", &module, &used) == 1; at += used)
                if (s->partition[s->count].n < GPUS) s->partition[s->count].module[s->partition[s->count].n++] = module;
            s->count++;
        }
    }
    if (file) fclose(file);
}

static int enter(struct state *s, const char *function) {
    load(s, function);
    while (s->hangs) { usleep(10000); load(s, function); }
    return s->failed;
}

static unsigned long long actives(const unsigned long long *write) {
    char path[512];
    unsigned long long mask = 0;
    snprintf(path, sizeof path, "%s.active", getenv("MOCK_NVFM") ? getenv("MOCK_NVFM") : "");
    FILE *file = fopen(path, write ? "w" : "r");
    if (!file) return 0;
    if (write) { fprintf(file, "%llx\n", *write); mask = *write; }
    else if (fscanf(file, "%llx", &mask) != 1) mask = 0;
    fclose(file);
    return mask;
}

#define ENTER struct state s; int rc = enter(&s, __func__); if (rc) return rc
#define CONNECTED ENTER; if (s.forgets && !forgot) { forgot = 1; connected = 0; } \
    connected &= !s.gone; if (!connected || h != (void *)&connected) return NOT_VALID

API int fmLibInit(void) { ENTER; if (initialized) return IN_USE; initialized = 1; return OK; }
API int fmConnect(connect_params *p, void **h) {
    ENTER;
    if (!initialized) return UNINITIALIZED;
    if (p->version != VERSION_OF(connect_params)) return MISMATCH;
    if (s.gone || !p->is_unix || strcmp(p->address, "/run/fm.sock")) return NOT_VALID;
    connected = 1;
    *h = &connected;
    return OK;
}
#ifndef WITHOUT_LIST
API int fmGetSupportedFabricPartitions(void *h, partition_list *list) {
    CONNECTED;
    if (list->version != VERSION_OF(partition_list)) return MISMATCH;
    unsigned long long active = actives(NULL);
    list->count = s.many ? (unsigned)s.many : (unsigned)s.count;
    list->most = PARTITIONS;
    for (int i = 0; i < s.count; i++) {
        partition_info *p = &list->partition[i];
        p->id = s.partition[i].id;
        p->active = active >> p->id & 1;
        p->gpus = s.partition[i].n;
        for (unsigned k = 0; k < p->gpus; k++) p->gpu[k].physical_id = s.partition[i].module[k];
    }
    return OK;
}
#endif
static int change(struct state *s, unsigned id, int on) {
    unsigned long long active = actives(NULL);
    for (int i = 0; i < s->count; i++)
        if (s->partition[i].id == id) {
            active = on ? active | 1ULL << id : active & ~(1ULL << id);
            if (!s->deaf) actives(&active);
            return OK;
        }
    return BADPARAM;
}
API int fmActivateFabricPartition(void *h, unsigned id) { CONNECTED; return change(&s, id, 1); }
API int fmDeactivateFabricPartition(void *h, unsigned id) { CONNECTED; return change(&s, id, 0); }
