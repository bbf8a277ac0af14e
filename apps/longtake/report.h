// A comparison for people: a table for the terminal, JSON, and one HTML page that needs no network.
#pragma once

#include <string>

#include "pipeline/comparison.h"

namespace longtake::cli {

// One row a method, in the shape of the table that papers of this field print.
std::string to_table(const ComparisonResult& result);

// docs/compare.md describes it. What was not measured is null.
std::string to_json(const ComparisonResult& result);

// Curves over time, recall by layer, and the methods' videos of the first scenario side by side.
// Videos are read from `folder` and become part of the page.
std::string to_html(const ComparisonResult& result, const std::string& folder);

}  // namespace longtake::cli
