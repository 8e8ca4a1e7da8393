/* A guest of some kilobytes, for what only needs a running QEMU: a multiboot kernel that lists its PCI functions on the
 * first serial port, writes a line each second, and powers off when asked to by ACPI. A Linux kernel needs minutes to boot
 * in a VM inside an emulated machine; this is up in seconds.
 *
 * References: Multiboot Specification 0.6.96; PCI configuration mechanism 1 (PCI Local Bus 3.0, 3.2.2.3.2); ACPI 4.8 (PM1
 * and PM timer registers; the base of the ICH9's is in its function 1f.0, register 0x40).
 */
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

__asm__(".section .multiboot,\"a\"\n.align 4\n.long 0x1BADB002, 0x3, -(0x1BADB002 + 0x3)\n"
        ".text\n.globl _start\n_start: movl $stack_top, %esp\n call guest_main\n1: hlt\n jmp 1b\n"
        ".bss\n.align 16\n.skip 8192\nstack_top:\n.text\n");

static inline void out8(u16 port, u8 value) { __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }
static inline void out16(u16 port, u16 value) { __asm__ volatile("outw %0, %1" ::"a"(value), "Nd"(port)); }
static inline void out32(u16 port, u32 value) { __asm__ volatile("outl %0, %1" ::"a"(value), "Nd"(port)); }
static inline u8 in8(u16 port) { u8 v; __asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u16 in16(u16 port) { u16 v; __asm__ volatile("inw %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u32 in32(u16 port) { u32 v; __asm__ volatile("inl %1, %0" : "=a"(v) : "Nd"(port)); return v; }

enum { COM1 = 0x3f8, PCI_ADDRESS = 0xcf8, PCI_DATA = 0xcfc, POWER_BUTTON = 0x100, SLEEP_ENABLE = 0x2000 };
enum { PM_TIMER_HZ = 3579545, PM_TIMER_MASK = 0xffffff };

static void put(char c) { while (!(in8(COM1 + 5) & 0x20)); out8(COM1, c); }
static void text(const char *s) { while (*s) put(*s++); }
static void hex(u32 value, int digits) { while (digits--) put("0123456789abcdef"[(value >> (4 * digits)) & 15]); }

static u32 config(int bus, int slot, int function, int offset)
{
    out32(PCI_ADDRESS, 0x80000000u | bus << 16 | slot << 11 | function << 8 | (offset & 0xfc));
    return in32(PCI_DATA);
}

static void set_config(int bus, int slot, int function, int offset, u32 value)
{
    out32(PCI_ADDRESS, 0x80000000u | bus << 16 | slot << 11 | function << 8 | (offset & 0xfc));
    out32(PCI_DATA, value);
}

/* Each memory BAR that firmware gave a place, as " barN SIZE@ADDRESS" in hex: sized by writing ones (ibid., 6.2.5.1) while the
 * function decodes nothing, and put back. */
static void list_bars(int bus, int slot, int function)
{
    u32 command = config(bus, slot, function, 4);
    set_config(bus, slot, function, 4, command & 0xfffc);
    for (int bar = 0; bar < 6; bar++) {
        int at = 0x10 + 4 * bar, wide;
        u32 low = config(bus, slot, function, at), high = 0, mask_high = 0xffffffff;
        if (low & 1) continue;
        wide = (low & 6) == 4;
        set_config(bus, slot, function, at, 0xffffffff);
        u32 mask = config(bus, slot, function, at) & 0xfffffff0;
        set_config(bus, slot, function, at, low);
        if (wide) {
            high = config(bus, slot, function, at + 4);
            set_config(bus, slot, function, at + 4, 0xffffffff);
            mask_high = config(bus, slot, function, at + 4);
            set_config(bus, slot, function, at + 4, high);
        }
        if (mask) mask_high = ~mask_high; else mask_high = ~mask_high + 1;
        if (mask || (wide && mask_high)) {
            text(" bar"); put('0' + bar); put(' '); hex(mask_high, 8); hex(~mask + 1, 8);
            put('@'); hex(high, 8); hex(low & 0xfffffff0, 8);
        }
        bar += wide;
    }
    set_config(bus, slot, function, 4, command & 0xffff);
}

/* Every bus, for an expander's are below no bridge of bus 0. */
static void list_functions(void)
{
    for (int bus = 0; bus < 256; bus++)
        for (int slot = 0; slot < 32; slot++)
            for (int function = 0; function < 8; function++) {
                u32 id = config(bus, slot, function, 0);
                if ((id & 0xffff) == 0xffff) {
                    if (!function) break;
                    continue;
                }
                u32 header = config(bus, slot, function, 12) >> 16;
                text("PCI "); hex(id & 0xffff, 4); put(':'); hex(id >> 16, 4);
                text(" class "); hex(config(bus, slot, function, 8) >> 8, 6);
                text(" at "); hex(bus, 2); put(':'); hex(slot, 2); put('.'); put('0' + function);
                if ((header & 0x7f) == 1) {
                    text(" to "); hex(config(bus, slot, function, 0x18) >> 8, 2);
                } else if (!(header & 0x7f)) {
                    list_bars(bus, slot, function);
                }
                text("\r\n");
                if (!function && !(header & 0x80)) break;
            }
}

/* Between two looks the processor is halted, as a guest's is that has nothing to do: one that spins costs an emulated server an
 * eighth of its time, or more. What wakes it is the timer of the PC (8254, 18 times a second) through the first 8259.
 */
enum { PIC1 = 0x20, PIC2 = 0xa0, PIT_COUNTER = 0x40, PIT_MODE = 0x43, TIMER_VECTOR = 0x20, CODE_SEGMENT = 8 };

static u32 segments[] = {0, 0, 0x0000ffff, 0x00cf9a00, 0x0000ffff, 0x00cf9200}; /* none, code, data: flat, 4 GiB */
static u32 gates[2 * (TIMER_VECTOR + 1)];

__asm__(".text\ntimer_gate: pushl %eax\n movb $0x20, %al\n outb %al, $0x20\n popl %eax\n iret\n");
extern void timer_gate(void);

static void wake_by_timer(void)
{
    struct { u16 limit; u32 base; } __attribute__((packed)) table = {sizeof segments - 1, (u32)segments};
    __asm__ volatile("lgdt %0\n ljmp $8, $1f\n1: movw $16, %%ax\n movw %%ax, %%ds\n movw %%ax, %%es\n movw %%ax, %%ss" ::"m"(table) : "eax", "memory");
    gates[2 * TIMER_VECTOR] = CODE_SEGMENT << 16 | ((u32)timer_gate & 0xffff);
    gates[2 * TIMER_VECTOR + 1] = ((u32)timer_gate & 0xffff0000) | 0x8e00;
    table.limit = sizeof gates - 1;
    table.base = (u32)gates;
    __asm__ volatile("lidt %0" ::"m"(table) : "memory");
    out8(PIC1, 0x11); out8(PIC1 + 1, TIMER_VECTOR); out8(PIC1 + 1, 4); out8(PIC1 + 1, 1); out8(PIC1 + 1, 0xfe);
    out8(PIC2, 0x11); out8(PIC2 + 1, TIMER_VECTOR + 8); out8(PIC2 + 1, 2); out8(PIC2 + 1, 1); out8(PIC2 + 1, 0xff);
    out8(PIT_MODE, 0x34); out8(PIT_COUNTER, 0); out8(PIT_COUNTER, 0);
}

void guest_main(void)
{
    out8(COM1 + 1, 0);
    text("GUEST-UP\r\n");
    list_functions();
    u16 power = config(0, 0x1f, 0, 0x40) & 0xff80;
    text("GUEST-READY\r\n");
    out16(power + 2, POWER_BUTTON);
    wake_by_timer();
    u32 seconds = 0, gathered = 0, before = in32(power + 8) & PM_TIMER_MASK;
    for (;;) {
        u32 now = in32(power + 8) & PM_TIMER_MASK;
        gathered += (now - before) & PM_TIMER_MASK;
        before = now;
        if (gathered >= PM_TIMER_HZ) {
            gathered = 0;
            text("TICK "); hex(++seconds, 8); text("\r\n");
        }
        if (in16(power) & POWER_BUTTON) {
            out16(power, POWER_BUTTON);
            text("POWER-BUTTON\r\n");
            out16(power + 4, SLEEP_ENABLE);
        }
        __asm__ volatile("sti\n hlt\n cli");
    }
}
