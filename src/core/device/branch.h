// Work beside what a Context's stream does: small launches that nothing waits for until the end of
// a pass.
#pragma once

#include "device/context.h"

namespace longtake {

// What comes on ctx's stream from here on waits for what runs beside it. Nothing on the CPU. To be
// called before a record (device/graph.h) ends and before the host synchronises.
void join_branch(Context& ctx);

// What comes on ctx's stream from here on waits for what is on `ahead`'s. Nothing on the CPU, or if
// both are one.
void follow(Context& ctx, Context& ahead);

namespace cuda {
void join_branch(Runtime& runtime);
void follow(Runtime& runtime, Runtime& ahead);
}  // namespace cuda

}  // namespace longtake
