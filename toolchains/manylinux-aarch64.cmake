# Linux on 64-bit ARM with glibc 2.17 or newer: Raspberry Pi OS, servers.
set(EDGE_WHEEL_TAGS manylinux_2_17_aarch64 manylinux2014_aarch64)
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(zig_target aarch64-linux-gnu.2.17)
include(${CMAKE_CURRENT_LIST_DIR}/zig.cmake)
