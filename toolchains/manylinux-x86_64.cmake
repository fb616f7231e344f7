# Linux on x86-64 with glibc 2.17 or newer.
set(EDGE_WHEEL_TAGS manylinux_2_17_x86_64 manylinux2014_x86_64)
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR x86_64)
set(zig_target x86_64-linux-gnu.2.17)
include(${CMAKE_CURRENT_LIST_DIR}/zig.cmake)
