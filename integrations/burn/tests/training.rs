//! A GQA transformer of two layers trains through these kernels: its gradients are those of Burn's own operations with K/V heads
//! expanded, and the loss on real text goes down.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::sync::Arc;

use burn::module::{Module, ModuleVisitor, Param};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig, RmsNorm, RmsNormConfig};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::activation::{silu, softmax};
use burn::tensor::{Device, Gradients, Int, Tensor, TensorData};
use common::{numbers, open, random, tensor};
use gqa_burn::{AttentionSpec, Dtype, Error, GqaAttention, Mask, Rope, Training, gqa};

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 32;
const WIDTH: usize = 128;
const LAYERS: usize = 2;
/// Tokens of a sequence.
const LEN: usize = 64;
/// Sequences of a batch.
const BATCH: usize = 4;

/// Bytes in, logits of the next byte out.
#[derive(Module, Debug)]
struct Model {
    embedding: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: Linear,
}

#[derive(Module, Debug)]
struct Layer {
    attention_norm: RmsNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    feed_forward_norm: RmsNorm,
    up: Linear,
    down: Linear,
}

/// Who attends.
enum Attend<'a> {
    /// This crate.
    Gqa(&'a mut Training),
    /// Burn, with one K/V head for each query head.
    Expanded(&'a Device),
}

fn unturned() -> gqa::SpecBuilder {
    AttentionSpec::builder(HEADS as u32, KV_HEADS as u32, DIM as u32).kv_dtype(Dtype::F32)
}

fn spec() -> AttentionSpec {
    unturned().rope(Rope::new(DIM as u32)).build().unwrap()
}

impl Model {
    fn new(device: &Device) -> Self {
        let linear = |from, to| LinearConfig::new(from, to).with_bias(false).init(device);
        let norm = || RmsNormConfig::new(WIDTH).init(device);
        let layer = || Layer {
            attention_norm: norm(),
            q: linear(WIDTH, HEADS * DIM),
            k: linear(WIDTH, KV_HEADS * DIM),
            v: linear(WIDTH, KV_HEADS * DIM),
            out: linear(HEADS * DIM, WIDTH),
            feed_forward_norm: norm(),
            up: linear(WIDTH, 2 * WIDTH),
            down: linear(2 * WIDTH, WIDTH),
        };
        Self {
            embedding: EmbeddingConfig::new(256, WIDTH).init(device),
            layers: (0..LAYERS).map(|_| layer()).collect(),
            norm: norm(),
            head: linear(WIDTH, 256),
        }
    }

    /// Cross-entropy of the next byte; `bytes` are `[BATCH, LEN]`.
    fn loss(&self, [bytes, next]: [Tensor<2, Int>; 2], mut attend: Attend<'_>) -> Tensor<1> {
        let tokens = BATCH * LEN;
        let mut x = self.embedding.forward(bytes).reshape([tokens, WIDTH]);
        for (nth, layer) in self.layers.iter().enumerate() {
            let normed = layer.attention_norm.forward(x.clone());
            let heads = |linear: &Linear, heads| linear.forward(normed.clone()).reshape([tokens, heads, DIM]);
            let qkv = [heads(&layer.q, HEADS), heads(&layer.k, KV_HEADS), heads(&layer.v, KV_HEADS)];
            let out = match &mut attend {
                Attend::Gqa(training) => training.forward(nth as u32, qkv).unwrap(),
                Attend::Expanded(device) => expanded(qkv, device),
            };
            x = x + layer.out.forward(out.reshape([tokens, HEADS * DIM]));
            let normed = layer.feed_forward_norm.forward(x.clone());
            x = x + layer.down.forward(silu(layer.up.forward(normed)));
        }
        let logits = self.head.forward(self.norm.forward(x));
        let device = logits.device();
        CrossEntropyLossConfig::new().init(&device).forward(logits, next.reshape([tokens]))
    }
}

/// Rotates pairs `(i, i + DIM / 2)` by position, in a sequence each.
fn turned(x: Tensor<4>, device: &Device) -> Tensor<4> {
    let half = DIM / 2;
    let angle = |i: usize| ((i / half) as f64 * 10_000f64.powf(-2.0 * (i % half) as f64 / DIM as f64)) as f32;
    let angles: Tensor<4> = tensor((0..LEN * half).map(angle).collect(), [1, 1, LEN, half], device);
    let (cos, sin) = (angles.clone().cos(), angles.sin());
    let (a, b) = (x.clone().narrow(3, 0, half), x.narrow(3, half, half));
    let turned = [a.clone() * cos.clone() - b.clone() * sin.clone(), b * cos + a * sin];
    Tensor::cat(turned.into(), 3)
}

/// Causal attention in Burn's operations.
fn expanded([q, k, v]: [Tensor<3>; 3], device: &Device) -> Tensor<3> {
    let expand = |x: Tensor<3>| {
        let heads = x.dims()[1];
        let x = x.reshape([BATCH, LEN, heads, 1, DIM]).expand([BATCH, LEN, heads, HEADS / heads, DIM]);
        x.reshape([BATCH, LEN, HEADS, DIM]).swap_dims(1, 2)
    };
    let (q, k, v) = (turned(expand(q), device), turned(expand(k), device), expand(v));
    let hidden = |i: usize| (i % LEN > i / LEN) as u8 as f32 * -1e9;
    let mask: Tensor<4> = tensor((0..LEN * LEN).map(hidden).collect(), [1, 1, LEN, LEN], device);
    let logits = q.matmul(k.swap_dims(2, 3)).mul_scalar((DIM as f64).powf(-0.5)) + mask;
    softmax(logits, 3).matmul(v).swap_dims(1, 2).reshape([BATCH * LEN, HEADS, DIM])
}

/// Batches of the Apache licence.
fn batch(step: usize, device: &Device) -> [Tensor<2, Int>; 2] {
    let text = include_bytes!("../../../LICENSE-APACHE");
    let starts = (0..BATCH).map(|row| (step * BATCH + row) * 997 % (text.len() - LEN - 1));
    let starts: Vec<usize> = starts.collect();
    [0, 1].map(|shift| {
        let bytes = starts.iter().flat_map(|start| &text[start + shift..][..LEN]);
        let bytes: Vec<i32> = bytes.map(|byte| i32::from(*byte)).collect();
        Tensor::from_data(TensorData::new(bytes, [BATCH, LEN]), device)
    })
}

/// Gradients of all weights, in the order of the model's fields.
struct Collect<'a>(&'a Gradients, Vec<Vec<f32>>);

impl ModuleVisitor for Collect<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.1.push(numbers(param.val().grad(self.0).expect("every weight has a gradient")));
    }
}

fn gradients(model: &Model, loss: Tensor<1>) -> Vec<Vec<f32>> {
    let gradients = loss.backward();
    let mut collect = Collect(&gradients, Vec::new());
    model.visit(&mut collect);
    collect.1
}

fn training(attention: &Arc<GqaAttention>) -> Training {
    attention.train(&[LEN as u32; BATCH], LAYERS as u32).unwrap()
}

/// The largest distance of each pair, as a part of its largest element.
fn distance(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
    let far = found.iter().zip(expected).fold(0f32, |far, (a, b)| far.max((a - b).abs()));
    assert!(largest > 0.0 && far.is_finite());
    far / largest
}

#[test]
fn fifty_steps_on_text_with_the_gradients_of_burns_own_operations() {
    let (device, setup) = open();
    let device = device.autodiff();
    let attention = Arc::new(GqaAttention::new(&setup, spec()).unwrap());
    device.seed(7);
    let mut model = Model::new(&device);
    let mut optimizer = AdamWConfig::new().init();
    let mut losses = Vec::new();
    for step in 0..50 {
        let batch = batch(step, &device);
        // At first, and when it has learned something.
        if step % 49 == 0 {
            let mut pass = training(&attention);
            let ours = gradients(&model, model.loss(batch.clone(), Attend::Gqa(&mut pass)));
            let theirs =
                gradients(&model, model.loss(batch.clone(), Attend::Expanded(&device.clone().inner())));
            assert_eq!(ours.len(), 3 + LAYERS * 8);
            for (nth, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
                let far = distance(ours, theirs);
                assert!(far <= 1e-4, "step {step}, weight {nth}: {far}");
            }
        }
        let mut pass = training(&attention);
        let loss = model.loss(batch, Attend::Gqa(&mut pass));
        // The graph has what it needs.
        drop(pass);
        losses.push(numbers(loss.clone())[0]);
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(3e-3, model, gradients);
    }
    let mean = |part: &[f32]| part.iter().sum::<f32>() / part.len() as f32;
    let (first, last) = (mean(&losses[..5]), mean(&losses[45..]));
    // A model that only knows how often bytes are there is at 3.1.
    assert!(first > 4.0 && last < 2.9, "{losses:?}");
}

/// Outputs, and gradients of one tensor that queries, keys and values are views of, of a loss that weighs each output.
fn views(attend: impl FnOnce([Tensor<3>; 3]) -> Tensor<3>, fused: &Tensor<3>) -> [Vec<f32>; 2] {
    let fused = fused.clone().autodiff().require_grad();
    let part = |first, heads| fused.clone().narrow(1, first, heads);
    let qkv = [part(0, HEADS), part(HEADS, KV_HEADS), part(HEADS + KV_HEADS, KV_HEADS)];
    let out = attend(qkv);
    let [tokens, heads, dim] = out.dims();
    let weight = |i: usize| ((i * 37 % 101) as f32) / 50.0 - 1.0;
    let weights = (0..tokens * heads * dim).map(weight).collect();
    let weights: Tensor<3> = tensor(weights, [tokens, heads, dim], &fused.device());
    // Turned, so that the gradient of the outputs is no dense tensor either.
    let loss = (out.clone().swap_dims(0, 1) * weights.swap_dims(0, 1)).sum();
    let gradients = loss.backward();
    [numbers(out), numbers(fused.grad(&gradients).unwrap())]
}

#[test]
fn views_of_one_tensor_under_a_mask() {
    let (device, setup) = open();
    let tokens = BATCH * LEN;
    let fused = random([tokens, HEADS + 2 * KV_HEADS, DIM], &device);
    let keep = random::<4>([BATCH, HEADS, LEN, LEN], &device).lower_elem(0.3);
    let spec = unturned().causal(false).mask(Mask::Keep).build().unwrap();
    let attention = Arc::new(GqaAttention::new(&setup, spec).unwrap());
    let mut pass = training(&attention);
    attention.keep_mask(pass.step(), keep.clone()).unwrap();
    let ours = views(|qkv| pass.forward(1, qkv).unwrap(), &fused);
    let theirs = views(
        |qkv| {
            let [q, k, v] = qkv.map(|x| {
                let heads = x.dims()[1];
                let x =
                    x.reshape([BATCH, LEN, heads, 1, DIM]).expand([BATCH, LEN, heads, HEADS / heads, DIM]);
                x.reshape([BATCH, LEN, HEADS, DIM]).swap_dims(1, 2)
            });
            let logits = q.matmul(k.swap_dims(2, 3)).mul_scalar((DIM as f64).powf(-0.5));
            let logits = logits.mask_fill(keep.bool_not(), -1e9);
            softmax(logits, 3).matmul(v).swap_dims(1, 2).reshape([tokens, HEADS, DIM])
        },
        &fused,
    );
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert!(distance(ours, theirs) <= 1e-4);
    }
}

#[test]
fn tensors_without_a_graph_and_layers_used_twice() {
    let (device, setup) = open();
    let attention = Arc::new(GqaAttention::new(&setup, spec()).unwrap());
    let mut pass = training(&attention);
    let qkv = [HEADS, KV_HEADS, KV_HEADS].map(|heads| random([BATCH * LEN, heads, DIM], &device));
    let plain = pass.forward(0, qkv.clone()).unwrap();
    assert!(!plain.is_autodiff());
    // Only the values want a gradient: the others are constants.
    let [q, k, v] = qkv.clone();
    let v = v.autodiff().require_grad();
    let out = pass.forward(1, [q, k, v.clone()]).unwrap();
    assert_eq!(numbers(plain), numbers(out.clone()));
    let gradients = out.sum().backward();
    // Weights of a row sum to one, and each value is of a group: so do the gradients, to what there are of rows.
    let sum: f64 = numbers(v.grad(&gradients).unwrap()).iter().map(|x| f64::from(*x)).sum();
    let expected = (BATCH * LEN * HEADS * DIM) as f64;
    assert!((sum - expected).abs() < expected * 1e-5, "{sum}");

    let again = pass.forward(1, qkv.clone()).unwrap_err();
    assert!(matches!(again, Error::Layer { layer: 1, used: true, .. }), "{again}");
    assert!(again.to_string().contains("begin another with `train`"));
    let beyond = pass.forward(2, qkv).unwrap_err();
    assert!(matches!(beyond, Error::Layer { layer: 2, layers: 2, used: false }), "{beyond}");
    let rotated = unturned().rotated(true).build().unwrap();
    let attention = Arc::new(GqaAttention::new(&setup, rotated).unwrap());
    assert!(matches!(attention.train(&[4], 1), Err(Error::Gqa(_))));
}
