# Parity with the official code. The data is in the folder that the environment variable
# LONGTAKE_GOLDENS names; without it these tests are reported as skipped.
if(LONGTAKE_HAS_CUDA)
  set(LONGTAKE_DEVICE_ROWS device_rows_cuda.cpp)
  set(LONGTAKE_GOLDEN_LIBS longtake_runtime CUDA::cudart_static)
  set(LONGTAKE_GOLDEN_LABELS cpu gpu golden)
else()
  set(LONGTAKE_DEVICE_ROWS device_rows_none.cpp)
  set(LONGTAKE_GOLDEN_LIBS longtake_runtime)
  set(LONGTAKE_GOLDEN_LABELS cpu golden)
endif()

# Arguments behind the name: sources beside its own.
function(longtake_golden_test name)
  longtake_test(${name} SOURCES ${name}.cpp ${ARGN} LIBS ${LONGTAKE_GOLDEN_LIBS} LABELS ${LONGTAKE_GOLDEN_LABELS})
  set_tests_properties(${name} PROPERTIES SKIP_REGULAR_EXPRESSION "LONGTAKE_GOLDENS is not set")
endfunction()

longtake_golden_test(golden_loader_test)
longtake_golden_test(golden_actions_test ${LONGTAKE_DEVICE_ROWS})
longtake_golden_test(golden_wan_test ${LONGTAKE_DEVICE_ROWS})
longtake_golden_test(golden_text_test)
longtake_golden_test(golden_decoder_test)
