# Windows on x86-64, with the universal C runtime of Windows 10.
set(EDGE_WHEEL_TAGS win_amd64)
set(CMAKE_SYSTEM_NAME Windows)
set(CMAKE_SYSTEM_PROCESSOR x86_64)
set(zig_target x86_64-windows-gnu)
include(${CMAKE_CURRENT_LIST_DIR}/zig.cmake)
