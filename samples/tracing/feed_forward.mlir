// The feed-forward part of a small transformer's layer, for 32 tokens: silu(x * up) * down.

func.func @feed_forward(%x: tensor<32x512xf32>, %up: tensor<512x1536xf32>, %down: tensor<1536x512xf32>)
    -> tensor<32x512xf32> {
  %zero = arith.constant 0.0 : f32
  %one = arith.constant 1.0 : f32

  %wide = tensor.empty() : tensor<32x1536xf32>
  %wide_zeros = linalg.fill ins(%zero : f32) outs(%wide : tensor<32x1536xf32>) -> tensor<32x1536xf32>
  %hidden = linalg.matmul ins(%x, %up : tensor<32x512xf32>, tensor<512x1536xf32>)
                          outs(%wide_zeros : tensor<32x1536xf32>) -> tensor<32x1536xf32>

  %active = linalg.map ins(%hidden : tensor<32x1536xf32>) outs(%wide : tensor<32x1536xf32>)
    (%value: f32, %out: f32) {
      %negative = arith.negf %value : f32
      %power = math.exp %negative : f32
      %sum = arith.addf %power, %one : f32
      %silu = arith.divf %value, %sum : f32
      linalg.yield %silu : f32
    }

  %narrow = tensor.empty() : tensor<32x512xf32>
  %narrow_zeros = linalg.fill ins(%zero : f32) outs(%narrow : tensor<32x512xf32>) -> tensor<32x512xf32>
  %result = linalg.matmul ins(%active, %down : tensor<32x1536xf32>, tensor<1536x512xf32>)
                          outs(%narrow_zeros : tensor<32x512xf32>) -> tensor<32x512xf32>
  return %result : tensor<32x512xf32>
}
