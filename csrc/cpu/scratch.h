#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace smoothk::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory that a thread keeps from call to call, given out in pieces.
class Scratch {
 public:
  // After this, pieces of `bytes` in all can be taken. Earlier ones are gone.
  void reserve(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset(new (std::align_val_t{64}) char[bytes]);
      size_ = bytes;
    }
    used_ = 0;
  }

  template <class T>
  T* take(int64_t count) {
    T* result = reinterpret_cast<T*>(memory_.get() + used_);
    used_ += bytes<T>(count);
    return result;
  }

  template <class T>
  static int64_t bytes(int64_t count) {
    return ceil_div(count * static_cast<int64_t>(sizeof(T)), 64) * 64;
  }

 private:
  struct Delete {
    void operator()(char* p) const { operator delete[](p, std::align_val_t{64}); }
  };
  std::unique_ptr<char[], Delete> memory_;
  int64_t size_ = 0, used_ = 0;
};

}  // namespace smoothk::cpu
