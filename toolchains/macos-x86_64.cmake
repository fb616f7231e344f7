# macOS 10.13 or newer on Intel.
set(EDGE_WHEEL_TAGS macosx_10_13_x86_64)
set(CMAKE_SYSTEM_NAME Darwin)
set(CMAKE_SYSTEM_PROCESSOR x86_64)
set(zig_target x86_64-macos.10.13)
include(${CMAKE_CURRENT_LIST_DIR}/zig.cmake)
