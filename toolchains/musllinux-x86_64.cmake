# Linux on x86-64 with musl 1.2: Alpine.
set(EDGE_WHEEL_TAGS musllinux_1_2_x86_64)
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR x86_64)
set(zig_target x86_64-linux-musl)
include(${CMAKE_CURRENT_LIST_DIR}/zig.cmake)
