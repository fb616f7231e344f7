# Part of the Android toolchain files, which set ANDROID_ABI and `android_cpu` first.
#
# ANDROID_NDK in the environment: the NDK's own toolchain file does it all. Else zig does, against
# libraries made on the spot that hold the names in functions.txt and nothing else. Its headers are
# those of musl: of the functions in that list they say what Android's say (types, sizes, constants),
# and a function that is not in it does not link.
set(EDGE_PAGE_SIZE 16384)
if(DEFINED ENV{ANDROID_NDK})
  set(ANDROID_PLATFORM android-21)
  include($ENV{ANDROID_NDK}/build/cmake/android.toolchain.cmake)
  return()
endif()

set(zig_target ${android_cpu}-linux-android.21)
cmake_path(SET stubs NORMALIZE ${CMAKE_CURRENT_LIST_DIR}/../../build/android/${android_cpu})
set(zig_libc ${CMAKE_COMMAND} -E env ZIG_LIBC=${stubs}/libc.txt)

function(run)
  execute_process(COMMAND ${ARGN} WORKING_DIRECTORY ${stubs} COMMAND_ERROR_IS_FATAL ANY)
endfunction()

function(make_stubs)
  file(MAKE_DIRECTORY ${stubs})
  execute_process(COMMAND python-zig env WORKING_DIRECTORY ${stubs} OUTPUT_VARIABLE zig_env
                  COMMAND_ERROR_IS_FATAL ANY)
  if(NOT zig_env MATCHES "lib_dir = \"([^\"]+)\"")
    message(FATAL_ERROR "`zig env` does not say where its headers are: ${zig_env}")
  endif()
  set(include ${CMAKE_MATCH_1}/libc/include)
  cmake_path(ABSOLUTE_PATH include BASE_DIRECTORY ${stubs} NORMALIZE) # zig may shorten it
  file(WRITE ${stubs}/libc.txt # the CPU's own headers first: the generic ones take it to have 32 bits
    "include_dir=${include}/${android_cpu}-linux-musl\nsys_include_dir=${include}/generic-musl\n"
    "crt_dir=${stubs}\ngcc_dir=${stubs}\nmsvc_lib_dir=\nkernel32_lib_dir=\ndarwin_sdk_dir=\n")

  set(compile ${zig_libc} python-zig cc -target ${zig_target} -w -fno-builtin -c)
  foreach(name crtbegin_so crtend_so) # what the linker puts around a library: here, nothing
    file(WRITE ${stubs}/${name}.c "")
    run(${compile} ${name}.c -o ${name}.o)
  endforeach()
  foreach(name libc libm libdl)
    file(STRINGS ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/functions.txt lines REGEX "^${name}: ")
    string(REGEX REPLACE "${name}: |;" " " functions "${lines}")
    string(REGEX REPLACE "[a-z_]+" "void \\0(void) {}\n" source "${functions}")
    file(WRITE ${stubs}/${name}.c "${source}")
    run(${compile} ${name}.c -o ${name}.o)
    run(python-zig ld.lld -shared -soname ${name}.so -o ${name}.so ${name}.o)
  endforeach()
endfunction()

if(${CMAKE_CURRENT_LIST_DIR}/functions.txt IS_NEWER_THAN ${stubs}/libdl.so # or there is none
   OR ${CMAKE_CURRENT_LIST_FILE} IS_NEWER_THAN ${stubs}/libdl.so)
  make_stubs()
endif()

include(${CMAKE_CURRENT_LIST_DIR}/../zig.cmake)
list(PREPEND CMAKE_C_COMPILER ${zig_libc})
set(CMAKE_SYSTEM_NAME Linux) # under its own name CMake would look for an NDK
set(CMAKE_SYSTEM_PROCESSOR ${android_cpu})
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
set(CMAKE_C_FLAGS_INIT -D__errno_location=__errno) # the one name that is another in Android
if(android_cpu STREQUAL "aarch64")
  string(APPEND CMAKE_C_FLAGS_INIT " -mno-outline-atomics") # which ask for more than functions.txt
endif()
set(CMAKE_SHARED_LINKER_FLAGS_INIT -L${stubs})
