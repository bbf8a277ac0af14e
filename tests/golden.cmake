# Parity with the official code. The data is in the folder that the environment variable
# LONGTAKE_GOLDENS names; without it these tests are reported as skipped.
function(longtake_golden_test name)
  longtake_test(${name} SOURCES ${name}.cpp LIBS longtake_runtime LABELS cpu golden)
  set_tests_properties(${name} PROPERTIES SKIP_REGULAR_EXPRESSION "LONGTAKE_GOLDENS is not set")
endfunction()

longtake_golden_test(golden_loader_test)
longtake_golden_test(golden_actions_test)
longtake_golden_test(golden_wan_test)
longtake_golden_test(golden_text_test)
longtake_golden_test(golden_decoder_test)
