// Runs one generated kernel outside of Python, on tensors whose every edge is watched.
//
//   host INPUT OUTPUT heap|before|behind
//
// INPUT is a row of 64-bit words and bytes, nothing between them:
//   programs on the axes x, y, z
//   how many pieces of memory; for each its length in bytes, then its bytes
//   how many arguments; for each the number of its piece and an offset into it in bytes, or -1 and the argument's slot
// OUTPUT gets the bytes of all pieces, one after the other, as the kernel left them.
//
// heap: each piece is an allocation of exactly its length, so AddressSanitizer knows both of its ends. It doesn't see
// the masked accesses of AVX-512, which the compiler does not instrument; the processor does. So there are two other
// places: "before" puts the last byte of each piece right before a page that nobody may touch, "behind" puts the first
// byte right behind one.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

extern "C" void fastattn_run(const int64_t* args, const int32_t* grid, int64_t begin, int64_t end);

namespace {

[[noreturn]] void fail(const char* what) {
  perror(what);
  exit(2);
}

void read_bytes(FILE* file, void* to, size_t length) {
  if (length != 0 && fread(to, 1, length, file) != length) fail("the input ends early");
}

int64_t read_word(FILE* file) {
  int64_t word;
  read_bytes(file, &word, sizeof word);
  return word;
}

char* allocate(size_t length, const std::string& place) {
  if (place == "heap") {
    void* at = malloc(length);
    if (at == nullptr) fail("malloc");
    return static_cast<char*>(at);
  }
  const size_t page = (size_t)sysconf(_SC_PAGESIZE), room = (length + page - 1) / page * page;
  void* whole = mmap(nullptr, room + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (whole == MAP_FAILED) fail("mmap");
  char* first = static_cast<char*>(whole) + page;
  if (room != 0 && mprotect(first, room, PROT_READ | PROT_WRITE) != 0) fail("mprotect");
  return place == "before" ? first + room - length : first;
}

struct Piece {
  char* at;
  size_t length;
};

}  // namespace

int main(int count, char** words) {
  if (count != 4) {
    fprintf(stderr, "usage: host INPUT OUTPUT heap|before|behind\n");
    return 2;
  }
  const std::string place = words[3];
  FILE* input = fopen(words[1], "rb");
  if (input == nullptr) fail(words[1]);
  int32_t grid[3];
  for (int32_t& programs : grid) programs = (int32_t)read_word(input);
  std::vector<Piece> pieces((size_t)read_word(input));
  for (Piece& piece : pieces) {
    piece.length = (size_t)read_word(input);
    piece.at = allocate(piece.length, place);
    read_bytes(input, piece.at, piece.length);
  }
  std::vector<int64_t> args((size_t)read_word(input));
  for (int64_t& slot : args) {
    const int64_t piece = read_word(input), value = read_word(input);
    slot = piece < 0 ? value : (int64_t)pieces[(size_t)piece].at + value;
  }
  fclose(input);

  fastattn_run(args.data(), grid, 0, (int64_t)grid[0] * grid[1] * grid[2]);

  FILE* output = fopen(words[2], "wb");
  if (output == nullptr) fail(words[2]);
  for (const Piece& piece : pieces) {
    if (fwrite(piece.at, 1, piece.length, output) != piece.length) fail(words[2]);
    if (place == "heap") free(piece.at);
  }
  return fclose(output) == 0 ? 0 : 2;
}
