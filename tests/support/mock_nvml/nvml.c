/* A libnvidia-ml.so.1 for tests: what it answers is written in the file that MOCK_NVML names, which is read anew for each
 * call, so that a test changes a board under a running program.
 *
 *   driver 570.86.15            version of the driver
 *   not-loaded                  nvmlInit answers DriverNotLoaded
 *   fail FUNCTION CODE          FUNCTION answers CODE (nvml.h, nvmlReturn_t)
 *   hang FUNCTION               FUNCTION does not return while this line is there
 *   xid INDEX NUMBER            an event; each such line is told once, in order, to whoever waits
 *   gpu                         begins a board; the lines "KEY VALUE" after it are its own (struct board below)
 *
 * A key that a board does not have is NotSupported. Built with -DWITHOUT_ROWS it lacks a function altogether.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))
enum { OK = 0, UNINITIALIZED = 1, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, SMALL = 7, NOT_LOADED = 9, TIMEOUT = 10, LOST = 15 };
enum { BOARDS = 16, KEYS = 48 };

struct board { int count; char key[KEYS][32]; char value[KEYS][512]; };
struct state { int boards; struct board board[BOARDS]; char driver[96]; int not_loaded; int failed; int hangs; int xids; int xid[64][2]; };
struct event { void *device; unsigned long long type, data; unsigned gpu_instance, compute_instance; };
struct pci { char legacy[16]; unsigned domain, bus, device, pci_id, subsystem_id; char bus_id[32]; };
struct memory { unsigned long long total, free, used; };
struct busy { unsigned gpu, memory; };
struct process { unsigned pid; unsigned long long memory; unsigned gpu_instance, compute_instance; };
struct profile { unsigned id, p2p, slices, instances, sms, copy, decoders, encoders, jpeg, ofa; unsigned long long memory_mb; };
struct place { unsigned start, size; };
struct instance_info { void *device; unsigned id, profile; struct place place; };
struct temperature { unsigned version; int sensor; int value; };

static int initialized, told;
static char handles[BOARDS]; /* a handle is the address of its board's place */

static void load(struct state *s, const char *function) {
    char line[640], key[32], value[512];
    memset(s, 0, sizeof *s);
    strcpy(s->driver, "570.86.15");
    const char *path = getenv("MOCK_NVML");
    FILE *file = path ? fopen(path, "r") : NULL;
    while (file && fgets(line, sizeof line, file)) {
        int words = sscanf(line, "%31s %511[^\n]", key, value);
        if (words < 1) continue;
        if (words < 2) value[0] = 0;
        if (!strcmp(key, "gpu") && s->boards < BOARDS) s->boards++;
        else if (!strcmp(key, "driver")) snprintf(s->driver, sizeof s->driver, "%.95s", value);
        else if (!strcmp(key, "not-loaded")) s->not_loaded = 1;
        else if (!strcmp(key, "fail")) {
            char name[64]; int code;
            if (sscanf(value, "%63s %d", name, &code) == 2 && !strcmp(name, function)) s->failed = code;
        }
        else if (!strcmp(key, "hang")) s->hangs |= !strcmp(value, function);
        else if (!strcmp(key, "xid") && s->xids < 64) {
            if (sscanf(value, "%d %d", &s->xid[s->xids][0], &s->xid[s->xids][1]) == 2) s->xids++;
        }
        else if (s->boards) {
            struct board *b = &s->board[s->boards - 1];
            if (b->count < KEYS) {
                snprintf(b->key[b->count], 32, "%.31s", key);
                snprintf(b->value[b->count++], 512, "%s", value);
            }
        }
    }
    if (file) fclose(file);
}

/* The state for one call of FUNCTION: hangs as long as it is told to, then what it fails with. */
static int enter(struct state *s, const char *function) {
    load(s, function);
    while (s->hangs) { usleep(10000); load(s, function); }
    if (!initialized) return UNINITIALIZED;
    return s->failed;
}

static const char *get(struct state *s, void *handle, const char *key) {
    long i = (char *)handle - handles;
    if (i < 0 || i >= s->boards) return NULL;
    for (int k = 0; k < s->board[i].count; k++)
        if (!strcmp(s->board[i].key[k], key)) return s->board[i].value[k];
    return NULL;
}

#define ENTER struct state s; int rc = enter(&s, __func__); if (rc) return rc
#define BOARD ENTER; if (get(&s, h, "lost")) return LOST

static int number(struct state *s, void *h, const char *key, unsigned *into) {
    const char *value = get(s, h, key);
    if (!value) return NOT_SUPPORTED;
    *into = (unsigned)strtoul(value, NULL, 0);
    return OK;
}
static int text(struct state *s, void *h, const char *key, char *into, unsigned size) {
    const char *value = get(s, h, key);
    if (!value) return NOT_SUPPORTED;
    if (strlen(value) >= size) return SMALL;
    strcpy(into, value);
    return OK;
}

static int start(const char *function) {
    struct state s;
    load(&s, function);
    while (s.hangs) { usleep(10000); load(&s, function); }
    if (s.not_loaded) return NOT_LOADED;
    if (s.failed) return s.failed;
    initialized = 1;
    return OK;
}
API int nvmlInit_v2(void) { return start(__func__); }
API int nvmlInitWithFlags(unsigned flags) { (void)flags; return start(__func__); }
API int nvmlShutdown(void) { initialized = 0; return OK; }
API const char *nvmlErrorString(int code) { return code == LOST ? "GPU is lost" : code == NOT_SUPPORTED ? "Not Supported" : "error of the mock"; }
API int nvmlSystemGetDriverVersion(char *into, unsigned size) { ENTER; snprintf(into, size, "%s", s.driver); return OK; }
API int nvmlDeviceGetCount_v2(unsigned *count) { ENTER; *count = s.boards; return OK; }
API int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **h) { ENTER; if (i >= (unsigned)s.boards) return INVALID; *h = &handles[i]; return OK; }
API int nvmlDeviceGetUUID(void *h, char *into, unsigned size) { ENTER; return text(&s, h, "uuid", into, size); }
API int nvmlDeviceGetName(void *h, char *into, unsigned size) { ENTER; return text(&s, h, "name", into, size); }
API int nvmlDeviceGetSerial(void *h, char *into, unsigned size) { BOARD; return text(&s, h, "serial", into, size); }
API int nvmlDeviceGetPciInfo_v3(void *h, struct pci *p) {
    ENTER;
    const char *bus = get(&s, h, "bus");
    memset(p, 0, sizeof *p);
    if (!bus || sscanf(bus, "%x:%x:%x", &p->domain, &p->bus, &p->device) != 3) return NOT_SUPPORTED;
    snprintf(p->bus_id, sizeof p->bus_id, "%08X:%02X:%02X.0", p->domain, p->bus & 255, p->device & 255);
    return OK;
}
API int nvmlDeviceGetMemoryInfo(void *h, struct memory *m) {
    BOARD;
    unsigned total, used = 0;
    if (number(&s, h, "memory", &total)) return NOT_SUPPORTED;
    number(&s, h, "used", &used);
    m->total = (unsigned long long)total << 20; m->used = (unsigned long long)used << 20; m->free = m->total - m->used;
    return OK;
}
API int nvmlDeviceGetUtilizationRates(void *h, struct busy *b) {
    BOARD;
    const char *value = get(&s, h, "busy");
    return value && sscanf(value, "%u %u", &b->gpu, &b->memory) == 2 ? OK : NOT_SUPPORTED;
}
API int nvmlDeviceGetTemperatureV(void *h, struct temperature *t) { BOARD; return number(&s, h, "temperature-v", (unsigned *)&t->value); }
API int nvmlDeviceGetTemperature(void *h, int sensor, unsigned *t) { (void)sensor; BOARD; return number(&s, h, "temperature", t); }
API int nvmlDeviceGetPowerUsage(void *h, unsigned *mw) { BOARD; return number(&s, h, "power", mw); }
API int nvmlDeviceGetTotalEccErrors(void *h, int kind, int counter, unsigned long long *count) {
    (void)counter; BOARD;
    unsigned value;
    if (number(&s, h, kind ? "ecc-uncorrected" : "ecc-corrected", &value)) return NOT_SUPPORTED;
    *count = value;
    return OK;
}
#ifndef WITHOUT_ROWS
API int nvmlDeviceGetRemappedRows(void *h, unsigned *corrected, unsigned *uncorrected, unsigned *pending, unsigned *failed) {
    BOARD;
    const char *value = get(&s, h, "rows");
    return value && sscanf(value, "%u %u %u %u", corrected, uncorrected, pending, failed) == 4 ? OK : NOT_SUPPORTED;
}
#endif
API int nvmlDeviceGetCurrPcieLinkGeneration(void *h, unsigned *n) { BOARD; return number(&s, h, "generation", n); }
API int nvmlDeviceGetMaxPcieLinkGeneration(void *h, unsigned *n) { BOARD; return number(&s, h, "generation-max", n); }
API int nvmlDeviceGetCurrPcieLinkWidth(void *h, unsigned *n) { BOARD; return number(&s, h, "width", n); }
API int nvmlDeviceGetMaxPcieLinkWidth(void *h, unsigned *n) { BOARD; return number(&s, h, "width-max", n); }
API int nvmlDeviceGetPcieReplayCounter(void *h, unsigned *n) { BOARD; return number(&s, h, "replays", n); }
API int nvmlDeviceGetModuleId(void *h, unsigned *n) { BOARD; return number(&s, h, "module", n); }
API int nvmlDeviceGetMigMode(void *h, unsigned *now, unsigned *next) { BOARD; int found = number(&s, h, "mig", now); *next = *now; return found; }

/* Four profiles of a board of 8 memory slices: 1g at 0..6, 2g at 0 2 4, 3g at 0 4, 7g. */
static const struct { unsigned slices, size; const char *starts; } MIG[] = { {1, 1, "0 1 2 3 4 5 6"}, {2, 2, "0 2 4"}, {3, 4, "0 4"}, {0, 0, ""}, {7, 8, "0"} };
API int nvmlDeviceGetGpuInstanceProfileInfo(void *h, unsigned profile, struct profile *p) {
    BOARD;
    unsigned total, on;
    if (number(&s, h, "mig", &on) || number(&s, h, "memory", &total)) return NOT_SUPPORTED;
    if (profile >= sizeof MIG / sizeof *MIG) return INVALID;
    if (!MIG[profile].slices) return NOT_SUPPORTED;
    memset(p, 0, sizeof *p);
    p->id = 100 + profile; p->slices = MIG[profile].slices; p->memory_mb = (unsigned long long)total * MIG[profile].size / 8;
    return OK;
}
API int nvmlDeviceGetGpuInstancePossiblePlacements_v2(void *h, unsigned id, struct place *places, unsigned *count) {
    BOARD;
    unsigned at = id - 100, n = 0, start;
    int used;
    if (at >= sizeof MIG / sizeof *MIG) return INVALID;
    for (const char *from = MIG[at].starts; sscanf(from, "%u%n", &start, &used) == 1; from += used, n++)
        if (places && n < *count) { places[n].start = start; places[n].size = MIG[at].size; }
    *count = n;
    return OK;
}
/* Key "instances": "PROFILE START SIZE" of each GPU instance that was made, with commas between. */
static int instance(struct state *s, void *h, unsigned nth, struct instance_info *into) {
    const char *from = get(s, h, "instances");
    for (; from && nth; nth--) { from = strchr(from, ','); if (from) from++; }
    if (!from || sscanf(from, "%u %u %u", &into->profile, &into->place.start, &into->place.size) != 3) return NOT_FOUND;
    into->device = h;
    return OK;
}
API int nvmlDeviceGetGpuInstances(void *h, unsigned profile, void **found, unsigned *count) {
    BOARD;
    struct instance_info info;
    unsigned n = 0;
    /* a handle is the board's with the instance's number, counted from 1, above it */
    for (unsigned i = 0; instance(&s, h, i, &info) == OK; i++)
        if (info.profile == profile && n < *count) found[n++] = (void *)(((unsigned long long)(i + 1) << 56) | (unsigned long long)h);
    *count = n;
    return OK;
}
API int nvmlGpuInstanceGetInfo(void *g, struct instance_info *info) {
    ENTER;
    unsigned long long word = (unsigned long long)g;
    memset(info, 0, sizeof *info);
    info->id = (unsigned)(word >> 56);
    return instance(&s, (void *)(word & 0xffffffffffffffULL), info->id - 1, info);
}
/* Key "vgpus": "NUMBER MEMORY_MIB MOST PROFILE NAME" of each type, with commas between; PROFILE -1: time-sliced. Types are the
 * same for all boards. */
static int vgpu(struct state *s, void *h, unsigned nth, unsigned number, unsigned *at, unsigned *mib, unsigned *most, int *profile, char *name) {
    for (int b = 0; b < s->boards; b++) {
        if (h && h != &handles[b]) continue;
        const char *from = get(s, &handles[b], "vgpus");
        unsigned n = 0;
        for (; from; n++) {
            if (sscanf(from, "%u %u %u %d %63[^,]", at, mib, most, profile, name) != 5) break;
            if (number ? *at == number : n == nth) return OK;
            from = strchr(from, ',');
            if (from) from++;
        }
    }
    return NOT_FOUND;
}
#define TYPE struct state s; int rc = enter(&s, __func__); if (rc) return rc; \
    unsigned at, mib, most; int profile; char name[64]; \
    if (vgpu(&s, NULL, 0, type, &at, &mib, &most, &profile, name)) return INVALID
API int nvmlDeviceGetSupportedVgpus(void *h, unsigned *count, unsigned *types) {
    BOARD;
    if (!get(&s, h, "vgpus")) return NOT_SUPPORTED;
    unsigned at, mib, most, n = 0, room = *count;
    int profile;
    char name[64];
    for (; vgpu(&s, h, n, 0, &at, &mib, &most, &profile, name) == OK; n++)
        if (types && n < room) types[n] = at;
    *count = n;
    return n > room || !types ? SMALL : OK;
}
API int nvmlVgpuTypeGetName(unsigned type, char *into, unsigned *size) { TYPE; snprintf(into, *size, "%s", name); return OK; }
API int nvmlVgpuTypeGetFramebufferSize(unsigned type, unsigned long long *bytes) { TYPE; *bytes = (unsigned long long)mib << 20; return OK; }
API int nvmlVgpuTypeGetMaxInstances(void *h, unsigned type, unsigned *count) { (void)h; TYPE; *count = most; return OK; }
API int nvmlVgpuTypeGetGpuInstanceProfileId(unsigned type, unsigned *id) { TYPE; *id = (unsigned)profile; return OK; }
static int processes(struct state *s, void *h, unsigned *count, struct process *into) {
    const char *from = get(s, h, "processes");
    unsigned n = 0, pid;
    int used;
    if (!from) return NOT_SUPPORTED;
    for (; sscanf(from, "%u%n", &pid, &used) == 1; from += used, n++)
        if (into && n < *count) { memset(&into[n], 0, sizeof *into); into[n].pid = pid; }
    int small = n > (into ? *count : 0);
    *count = n;
    return small ? SMALL : OK;
}
API int nvmlDeviceGetComputeRunningProcesses_v3(void *h, unsigned *count, struct process *into) { BOARD; return processes(&s, h, count, into); }
API int nvmlDeviceGetGraphicsRunningProcesses_v3(void *h, unsigned *count, struct process *into) { (void)into; BOARD; *count = 0; return OK; }

API int nvmlEventSetCreate(void **set) { ENTER; *set = malloc(1); return OK; }
API int nvmlEventSetFree(void *set) { free(set); return OK; }
API int nvmlDeviceRegisterEvents(void *h, unsigned long long types, void *set) { (void)types; (void)set; BOARD; return get(&s, h, "no-events") ? NOT_SUPPORTED : OK; }
API int nvmlEventSetWait_v2(void *set, struct event *event, unsigned timeout_ms) {
    (void)set;
    for (unsigned waited = 0; waited <= timeout_ms; waited += 10) {
        ENTER;
        if (told < s.xids) {
            memset(event, 0, sizeof *event);
            event->device = &handles[s.xid[told][0]];
            event->type = 8; /* nvmlEventTypeXidCriticalError */
            event->data = s.xid[told++][1];
            return OK;
        }
        usleep(10000);
    }
    return TIMEOUT;
}
