// What the shim's files share: how a C++ exception becomes a return code and a message.
#pragma once

#include <ATen/core/Tensor.h>

#include <exception>
#include <string>

using T = at::Tensor*;

// The message of this thread's last failing call.
inline thread_local std::string last_error;

// Runs `body`: 0, or -1 with the message kept.
template <typename F>
int guarded(F&& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& e) {
    last_error = e.what();
  } catch (...) {
    last_error = "unknown C++ exception";
  }
  return -1;
}
