// What a merge leaves so that it can be undone: elements that subtraction alone would not restore.
#pragma once

#include <cstdint>
#include <vector>

namespace fastlora {

constexpr int64_t TILE = 1 << 16;  // elements at most: a position fits 16 bits

// A matrix (N, K) in tiles of whole rows, or of parts of one row where a row has more elements.
struct Tiles {
    int64_t N, K, width, height, across, count;

    Tiles(int64_t N, int64_t K) : N(N), K(K) {
        width = K < TILE ? (K > 0 ? K : 1) : TILE;
        height = TILE / width;
        across = (K + width - 1) / width;
        count = K > 0 && N > 0 ? (N + height - 1) / height * across : 0;
    }

    int64_t top(int64_t tile) const { return tile / across * height; }
    int64_t left(int64_t tile) const { return tile % across * width; }
    int64_t rows(int64_t tile) const { return height < N - top(tile) ? height : N - top(tile); }
    int64_t columns(int64_t tile) const { return width < K - left(tile) ? width : K - left(tile); }
};

struct Receipt {
    struct Tile {
        std::vector<uint16_t> positions;  // room for more; the first `size` are set
        std::vector<unsigned char> bits;
        int64_t size = 0;
        uint64_t checksum = 0;  // of the merged tile
        int64_t done = 0;       // blocks of the tile that were written

        // Gives back the room for more.
        void fit(int64_t element_size) {
            positions.resize(size);
            positions.shrink_to_fit();
            bits.resize(size * element_size);
            bits.shrink_to_fit();
        }
    };

    int64_t element_size = 0;
    uint64_t factors = 0;  // digest of A and B
    std::vector<Tile> tiles;
};

}  // namespace fastlora
