// Adapters in pages of a few ranks, found through a table, and what they add to rows.
//
// Rank i of slot s is row i % page of page table[s, i / page], of A and of B alike: B's outputs lie
// side by side, so that a vector of them is a column as it lies, and nothing is transposed. A page
// that is not there holds nothing: its ranks are left out. The sums' order is that of expand.h.
#pragma once

#include <algorithm>

#include "cpu/buffer.h"
#include "cpu/linear/dots.h"
#include "cpu/linear/expand.h"
#include "cpu/table.h"

namespace fastlora::FL_ISA {

// Where every rank of the slots in use lies: looked up once a call.
template <class T>
class Pages {
  public:
    explicit Pages(const LinearArgs& a) : begin(a.S), count(a.S) {
        const auto limit = [&](int64_t s) {
            const int64_t own = a.ranks ? std::clamp<int64_t>(a.ranks[s], 0, a.R) : a.R;
            return a.starts[s] < a.starts[s + 1] ? own : 0;
        };
        int64_t room = 0;
        for (int64_t s = 0; s < a.S; ++s) room += limit(s);
        A = Buffer<const T*>(room);
        B = Buffer<const T*>(room);
        for (int64_t s = 0; s < a.S; ++s) {
            const int64_t ranks = limit(s);
            begin[s] = total;
            for (int64_t i = 0; i * a.page < ranks; ++i)
                add(a, a.table[s * a.table_ld + i], std::min(a.page, ranks - i * a.page));
            count[s] = total - begin[s];
            most = std::max(most, count[s]);
        }
    }

    Slot<T> slot(int64_t s) const {
        return {count[s], nullptr, nullptr, nullptr, A.get() + begin[s], B.get() + begin[s]};
    }

    // Ranks of the slots in use: all of them, and of the one that has most.
    int64_t total = 0, most = 0;

  private:
    Buffer<const T*> A, B;         // [total]
    Buffer<int64_t> begin, count;  // [S]

    void add(const LinearArgs& a, int64_t page, int64_t ranks) {
        if (page < 0 || page >= a.pages) return;
        for (int64_t i = 0; i < ranks; ++i, ++total) {
            A[total] = static_cast<const T*>(a.A) + page * a.lda_slot + i * a.lda;
            B[total] = static_cast<const T*>(a.B) + page * a.ldb_slot + i * a.ldb;
        }
    }
};

// The column of outputs n ... n + width - 1, at most a vector's, for some of PER ranks.
template <class X, class T>
inline F part_column(const T* const* rank, int64_t ranks, int64_t n, int64_t width) {
    constexpr int PER = Packets<X>::PER;
    T padded[PER][W] = {};
    const T* rows[PER];
    for (int i = 0; i < PER; ++i) {
        if (i < ranks) std::memcpy(padded[i], rank[i] + n, width * sizeof(T));
        rows[i] = padded[i];
    }
    return Packets<X>::column(rows, 0);
}

// As Expand, for outputs first + n, n in [0, N), of a slot in pages.
template <class X, class T, class Row, class Finish>
struct ExpandPages {
    Slot<T> slot, next;  // next: whose B is read after this one's
    int64_t first, N, rows;
    Row h_row;
    Finish finish;

    void come_closer(int64_t n, int64_t width) const {
        for (int64_t r = 0; r < next.r; ++r)
            for (int64_t i = 0; i < width; i += 64 / sizeof(T))
                __builtin_prefetch(next.B_ranks[r] + first + n + i, 0, 2);
    }

    // A column is loaded once for ROWS rows, whose sums stay in registers.
    template <int ROWS, int COUNT>
    void tile(int64_t i, int64_t n, int64_t width) const {
        using packets = Packets<X>;
        const typename packets::H* h[ROWS];
        for (int m = 0; m < ROWS; ++m) h[m] = h_row(i + m);
        F sum[ROWS][COUNT];
        for (auto& row : sum)
            for (F& s : row) s = zero();
        const int64_t whole = width == W ? slot.r / packets::PER * packets::PER : 0;
        for (int64_t r = 0; r < slot.r; r += packets::PER)
            for (int v = 0; v < COUNT; ++v) {
                const T* const* rank = slot.B_ranks + r;
                const int64_t at = first + n + v * W;
                const F column = r < whole ? packets::column(rank, at)
                                           : part_column<X>(rank, slot.r - r, at, width);
                for (int m = 0; m < ROWS; ++m)
                    sum[m][v] = packets::step(sum[m][v], column, h[m] + r);
            }
        for (int m = 0; m < ROWS; ++m)
            for (int v = 0; v < COUNT; ++v) finish(i + m, n + v * W, width, sum[m][v]);
    }

    // COUNT vectors of outputs at a time, while there are as many: ROWS rows, then what is left.
    template <int ROWS, int COUNT>
    int64_t tiles(int64_t n) const {
        for (; n + COUNT * W <= N; n += COUNT * W) {
            come_closer(n, COUNT * W);
            int64_t i = 0;
            for (; i + ROWS <= rows; i += ROWS) tile<ROWS, COUNT>(i, n, W);
            for (; i < rows; ++i) tile<1, COUNT>(i, n, W);
        }
        return n;
    }

    // A rank that leaves room for its columns in registers while the rows pass by.
    template <int COLUMNS, int COUNT>
    int64_t in_registers() const {
        using packets = Packets<X>;
        int64_t n = 0;
        for (; n + COUNT * W <= N; n += COUNT * W) {
            come_closer(n, COUNT * W);
            F column[COUNT][COLUMNS];
            for (int v = 0; v < COUNT; ++v)
                for (int c = 0; c < COLUMNS; ++c)
                    column[v][c] =
                        packets::column(slot.B_ranks + c * packets::PER, first + n + v * W);
            for (int64_t i = 0; i < rows; ++i) {
                const auto* h = h_row(i);
                F sum[COUNT];
                for (F& s : sum) s = zero();
                for (int c = 0; c < COLUMNS; ++c)
                    for (int v = 0; v < COUNT; ++v)
                        sum[v] = packets::step(sum[v], column[v][c], h + c * packets::PER);
                for (int v = 0; v < COUNT; ++v) finish(i, n + v * W, W, sum[v]);
            }
        }
        return n;
    }

    int64_t several_rows() const {
        constexpr int PER = Packets<X>::PER;
        if (slot.r == 4 * PER) return in_registers<4, 2>();
        if (slot.r == 8 * PER) return W == 16 ? in_registers<8, 2>() : in_registers<8, 1>();
        if (slot.r == 16 * PER && W == 16) return in_registers<16, 1>();
        return tiles<MB, 4>(0);
    }

    void run() const {
        int64_t n = rows == 1 ? tiles<1, 4>(tiles<1, 8>(0)) : several_rows();
        n = tiles<MB, 1>(n);
        if (n == N) return;
        come_closer(n, N - n);
        for (int64_t i = 0; i < rows; ++i) tile<1, 1>(i, n, N - n);
    }
};

}  // namespace fastlora::FL_ISA
