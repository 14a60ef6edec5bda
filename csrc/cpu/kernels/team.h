// The products of one tile, shared out among threads. Included once per capability, after linear.h.
//
// Few rows make one tile, and what takes the time is reading the weights. Threads therefore take matrices, and column
// blocks of them where there are fewer matrices than threads: no sum is cut, so that results are the same bits.

// Calls function(i, worker) for so many items, by all threads of the team.
template <typename Function>
void share_items(const Team& team, int64_t count, const Function& function) {
  const auto call = [](void* context, int64_t i, int64_t worker) {
    (*static_cast<const Function*>(context))(i, worker);
  };
  void* context = const_cast<void*>(static_cast<const void*>(&function));
  if (team.workers > 1) {
    team.share_out(team.tile, count, call, context);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    call(context, i, 0);
  }
}

// The scratch of every thread's products.
template <typename scalar_t>
class TeamScratch {
 public:
  TeamScratch(const Trunk<scalar_t>& trunk, const Widest<scalar_t>& widest, Scratch<scalar_t>& scratch)
      : team(trunk.team) {
    for (int64_t worker = 0; worker < team.workers; ++worker) {
      products.emplace_back(trunk.tile_rows(), widest.factor, false, scratch);
      products.back().branch = scratch.take(trunk.tile_rows() * widest.rounded);
    }
  }

  Team team;
  std::vector<ProductScratch<scalar_t>> products;
};

// Products of `rows` rows with each of `matrices` matrices, as items for the threads.
template <typename scalar_t>
class SharedProducts {
 public:
  SharedProducts(const TeamScratch<scalar_t>& scratch, int64_t rows, int64_t matrices, const Weights<scalar_t>& weights,
                 Rounding rounding)
      : n_(weights.n), matrices_(matrices), block_(std::max<int64_t>(weights.n, 1)) {
    constexpr int64_t kItemsPerWorker = 4;
    const int64_t workers = scratch.team.workers;
    shared_ = workers > 1 && worth_sharing(rows, matrices, weights);
    // Products of rounded factors and of parts are not cut: their layouts are not made for it.
    if (!shared_ || rounding != Rounding::kNone || weights.bfloat16_panels.first != nullptr) {
      return;
    }
    constexpr int64_t least = kPanelsToStream * kPanel<scalar_t>;
    for (int64_t blocks = 1; blocks * least <= n_; ++blocks) {
      block_ = round_up((n_ + blocks - 1) / blocks, kPanel<scalar_t>);
      const int64_t items = matrices_ * blocks;
      if (items % workers == 0 || items >= kItemsPerWorker * workers) {
        break;
      }
    }
  }

  // Whether several threads take part; each then prepares its rows itself.
  bool shared() const { return shared_; }

  // Says what the product after this one reads first, if this thread computes that one too.
  void follow_with(Rounding rounding, const Weights<scalar_t>& weights, int64_t i,
                   ProductScratch<scalar_t>& product) const {
    if (!shared_) {
      product.following = first_lines(rounding, weights, i, product);
    }
  }

  // Calls function(matrix, columns, scratch) for all of them.
  template <typename Function>
  void run(TeamScratch<scalar_t>& scratch, const Function& function) const {
    const int64_t blocks = (n_ + block_ - 1) / block_;
    const auto item = [&](int64_t i, int64_t worker) {
      const int64_t begin = i % blocks * block_;
      scratch.products[worker].following = {};
      function(i / blocks, Range{begin, std::min(begin + block_, n_)}, scratch.products[worker]);
    };
    if (!shared_) {
      for (int64_t i = 0; i < matrices_ * blocks; ++i) {
        item(i, 0);
      }
      return;
    }
    share_items(scratch.team, matrices_ * blocks, [&](int64_t i, int64_t worker) {
      [[maybe_unused]] const TileRegisters registers;
      item(i, worker);
    });
    // The items of this thread have given them back.
    TileRegisters::set_up();
  }

 private:
  int64_t n_;
  int64_t matrices_;
  int64_t block_;  // columns
  bool shared_ = false;
};

// These columns of rows of V = δ(bias + [A1 ; A2] W_i); all columns where a factor is rounded.
template <typename scalar_t>
inline void linear_of(Rounding rounding, Range rows, Range columns, const Input<scalar_t>& a,
                      const Weights<scalar_t>& weights, int64_t i, Activation activation, Matrix<scalar_t> v,
                      ProductScratch<scalar_t>& scratch) {
  if (columns.size() == weights.n) {
    linear(rounding, rows, a, weights, i, activation, v, scratch);
  } else {
    const bool clamped = linear_columns(rows, columns, a, weights, i, least_of<scalar_t>(activation), v, scratch);
    activate_sums(activation, clamped, v.row_range(rows.begin, rows.end).columns(columns.begin, columns.size()));
  }
}
