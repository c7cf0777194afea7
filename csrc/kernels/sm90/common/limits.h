// What the multiprocessor sets, for host and device code.
#pragma once

namespace ternary::sm90 {

constexpr int kSharedBytes = 227 * 1024;  // of a block, at most

}  // namespace ternary::sm90
