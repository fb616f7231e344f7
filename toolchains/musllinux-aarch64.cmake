# Linux on 64-bit ARM with musl 1.2: Alpine.
set(EDGE_WHEEL_TAGS musllinux_1_2_aarch64)
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(zig_target aarch64-linux-musl)
include(${CMAKE_CURRENT_LIST_DIR}/zig.cmake)
