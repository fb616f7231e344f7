# Part of other toolchain files, which set `zig_target` first: zig (package ziglang) as C compiler.
# A target is always named: without one zig compiles for the CPU of this very machine. -g0: zig would
# write down for a debugger what the linker throws away, which took a third of the time.
set(CMAKE_C_COMPILER python-zig cc -target ${zig_target} -g0)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)

# zig has names of its own for the extensions of ARM CPUs.
set(EDGE_FLAGS_dotprod -mcpu=generic+dotprod)
set(EDGE_FLAGS_i8mm -mcpu=generic+dotprod+i8mm)
set(EDGE_FLAGS_neon32 -mcpu=baseline+neon+vfp4)
