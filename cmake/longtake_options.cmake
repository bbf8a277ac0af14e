# Compile options that every target of the project shares.
add_library(longtake_options INTERFACE)
target_compile_options(longtake_options INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wpedantic -Wshadow -Wnon-virtual-dtor -Woverloaded-virtual -Wimplicit-fallthrough>)
if(LONGTAKE_DEV)
  target_compile_options(longtake_options INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
endif()

# longtake_test(NAME SOURCES a.cpp ... LIBS x ... [LABELS cpu slow ...]): one GoogleTest binary, run as one ctest entry.
function(longtake_test name)
  cmake_parse_arguments(T "" "TIMEOUT" "SOURCES;LIBS;LABELS" ${ARGN})
  add_executable(${name} ${T_SOURCES})
  target_link_libraries(${name} PRIVATE ${T_LIBS} longtake_options GTest::gtest GTest::gtest_main)
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR}/tests)
  add_test(NAME ${name} COMMAND ${name} WORKING_DIRECTORY ${PROJECT_SOURCE_DIR})
  if(NOT T_LABELS)
    set(T_LABELS cpu)
  endif()
  if(NOT T_TIMEOUT)
    set(T_TIMEOUT 300)
  endif()
  set_tests_properties(${name} PROPERTIES LABELS "${T_LABELS}" TIMEOUT ${T_TIMEOUT})
endfunction()

# Compile every public header of TARGET on its own, so that a missing include is found at once.
function(longtake_check_headers target)
  if(LONGTAKE_DEV)
    set_target_properties(${target} PROPERTIES VERIFY_INTERFACE_HEADER_SETS ON)
  endif()
endfunction()
