# Tests of the runtime library and of the binary.
longtake_test(io_test SOURCES io_test.cpp LIBS longtake_runtime)
longtake_test(model_parity_test SOURCES model_parity_test.cpp LIBS longtake_runtime)
longtake_test(pipeline_test SOURCES pipeline_test.cpp LIBS longtake_runtime)
longtake_test(cli_test SOURCES cli_test.cpp LIBS longtake_runtime)
add_dependencies(cli_test longtake_cli)
target_compile_definitions(cli_test PRIVATE LONGTAKE_BINARY="$<TARGET_FILE:longtake_cli>")
longtake_test(metrics_test SOURCES metrics_test.cpp LIBS longtake_runtime)
longtake_test(select_test SOURCES select_test.cpp LIBS longtake_runtime)
