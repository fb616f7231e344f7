/* A plugin of qemu-user 7.2: which instructions a program executed between its marks.
 *
 *   qemu-aarch64 -plugin plugin.so,out=FILE PROGRAM
 *
 * A mark is system call MARK, which no kernel has, with a number as its argument. At each mark
 * FILE gets a line `mark NUMBER`, then a line `ADDRESS INSTRUCTIONS TIMES` for each translated
 * block that ran since the mark before. One thread only: counters are added to without a lock.
 * No Debian package has qemu-plugin.h, so what is used of it is declared here.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MARK = 4242, ADD_U64 = 0 };

typedef uint64_t plugin_id;
struct tb;
typedef void tb_translated(plugin_id id, struct tb *tb);
typedef void syscall_entered(plugin_id id, unsigned vcpu, int64_t number, uint64_t a1, uint64_t a2,
                             uint64_t a3, uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7,
                             uint64_t a8);
size_t qemu_plugin_tb_n_insns(const struct tb *tb);
uint64_t qemu_plugin_tb_vaddr(const struct tb *tb);
void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id id, tb_translated *callback);
void qemu_plugin_register_vcpu_tb_exec_inline(struct tb *tb, int op, void *counter, uint64_t by);
void qemu_plugin_register_vcpu_syscall_cb(plugin_id id, syscall_entered *callback);

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

struct block {
    struct block *next;
    uint64_t address, n_instructions, times;
};

static struct block *blocks;
static FILE *out;

static void translated(plugin_id id, struct tb *tb) {
    (void)id;
    struct block *b = calloc(1, sizeof *b);
    if (b == NULL) abort();
    *b = (struct block){blocks, qemu_plugin_tb_vaddr(tb), qemu_plugin_tb_n_insns(tb), 0};
    blocks = b;
    qemu_plugin_register_vcpu_tb_exec_inline(tb, ADD_U64, &b->times, 1);
}

static void entered(plugin_id id, unsigned vcpu, int64_t number, uint64_t a1, uint64_t a2,
                    uint64_t a3, uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8) {
    (void)id, (void)vcpu, (void)a2, (void)a3, (void)a4, (void)a5, (void)a6, (void)a7, (void)a8;
    if (number != MARK) return;
    fprintf(out, "mark %" PRIu64 "\n", a1);
    for (struct block *b = blocks; b != NULL; b = b->next) {
        if (b->times == 0) continue;
        fprintf(out, "%" PRIx64 " %" PRIu64 " %" PRIu64 "\n", b->address, b->n_instructions,
                b->times);
        b->times = 0;
    }
    fflush(out);
}

__attribute__((visibility("default"))) int qemu_plugin_install(plugin_id id, const void *info,
                                                               int argc, char **argv) {
    (void)info;
    if (argc != 1 || strncmp(argv[0], "out=", 4) != 0 || (out = fopen(argv[0] + 4, "w")) == NULL)
        return -1;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_vcpu_syscall_cb(id, entered);
    return 0;
}
