# Install rules and the package config: `find_package(longtake)` gives longtake::core and longtake::runtime.
include(CMakePackageConfigHelpers)
install(TARGETS longtake_core longtake_media longtake_overworld longtake_runtime longtake_options EXPORT longtake_targets
        ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} FILE_SET HEADERS DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/longtake)
install(TARGETS longtake_cli RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
install(DIRECTORY models/world DESTINATION ${CMAKE_INSTALL_DATADIR}/longtake/models)
install(EXPORT longtake_targets NAMESPACE longtake:: DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/longtake)
configure_package_config_file(cmake/longtakeConfig.cmake.in ${PROJECT_BINARY_DIR}/longtakeConfig.cmake
                              INSTALL_DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/longtake)
write_basic_package_version_file(${PROJECT_BINARY_DIR}/longtakeConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/longtakeConfig.cmake ${PROJECT_BINARY_DIR}/longtakeConfigVersion.cmake
        DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/longtake)
