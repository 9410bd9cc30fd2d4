//! A variant, compiled: shader module, bind group layout, pipeline.

use std::sync::{Arc, OnceLock};

use crate::device::said;
use crate::error::Error;
use crate::shader::{Access, Compiler, Variant, link};

/// A compiled kernel.
#[derive(Debug, Clone)]
pub(crate) struct Pipeline {
    label: String,
    bindings: Vec<u32>,
    layout: wgpu::BindGroupLayout,
    pub(crate) pipeline: wgpu::ComputePipeline,
}

/// What the kernels of one attention are compiled with.
#[derive(Debug, Clone)]
pub(crate) struct Build {
    pub(crate) device: wgpu::Device,
    pub(crate) checked: bool,
    pub(crate) cache: Option<wgpu::PipelineCache>,
}

/// A variant that is compiled where it is first wanted: a program that only decodes never waits for prefill.
#[derive(Debug, Clone)]
pub(crate) struct Lazy(Arc<(Build, Variant, OnceLock<Pipeline>)>);

impl Lazy {
    pub(crate) fn new(build: &Build, variant: Variant) -> Self {
        Self(Arc::new((build.clone(), variant, OnceLock::new())))
    }

    /// The pipeline, compiled now where it has not been. Two threads may both compile it; one result stays.
    pub(crate) fn get(&self) -> Result<&Pipeline, Error> {
        let (build, variant, compiled) = &*self.0;
        if let Some(pipeline) = compiled.get() {
            return Ok(pipeline);
        }
        let pipeline = Pipeline::new(build, variant)?;
        Ok(compiled.get_or_init(|| pipeline))
    }
}

impl Pipeline {
    pub(crate) fn new(build: &Build, variant: &Variant) -> Result<Self, Error> {
        let Build { device, checked, cache } = build;
        let label = format!("gqa.{}", variant.kernel);
        let linked = link(variant, Compiler::Naga);
        // A driver's own refusal is an internal error.
        let scopes =
            [wgpu::ErrorFilter::Validation, wgpu::ErrorFilter::Internal].map(|f| device.push_error_scope(f));
        let descriptor = wgpu::ShaderModuleDescriptor {
            label: Some(&label),
            source: wgpu::ShaderSource::Wgsl(linked.text.as_str().into()),
        };
        let module = if *checked {
            device.create_shader_module(descriptor)
        } else {
            // SAFETY: every index is in range. Queries, outputs, LSE and new K/V: layouts are checked against the batch
            // (`Batch::resolve`) and views against the layouts (`Caps::view`). Pages: a table has an entry for every slot up to the
            // sequence's length, no query sees a key before what is kept (`check_kept`), entries are pages of their shard
            // (`SequenceTable`), and a step whose pages have changed hands is not recorded (`KnownChanges`).
            // Masks, trees and maps: words are counted where they are numbered (`Resolved`, `place_maps`), a caller's mask is viewed
            // up to its last element (`MaskLayout::index`), and kernels ask only for rows and keys of the item. Documents are spans of
            // their sequence. Tables: laid out by the spec. `Merge::prepare` checks its layouts itself. States, lists and parts: sized
            // by the plan that numbers them. Work lists: items are counted in their head; a step's memory is used again only where all
            // of this holds for every binding made of it (`Step::lay_out`). In loops on the GPU lengths are clamped between what the
            // cache held and what is reserved, `check_kept` holds for both, and lists have room for the most that they then give (`Room`). Gradients: of the step's own batch (`BackwardStep::batch`);
            // rows and gradients in f32 are sized by its tokens, runs and tiles are of its queries and new tokens
            // (`BackwardPlan::work`). Loops run over these same bounds, so they end. The tests run every kernel checked and unchecked.
            unsafe { device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) }
        };
        let bindings = variant.bindings();
        let entries: Vec<_> = bindings
            .iter()
            .map(|&(binding, access)| wgpu::BindGroupLayoutEntry {
                binding,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer {
                    ty: match access {
                        Access::Uniform => wgpu::BufferBindingType::Uniform,
                        Access::Read => wgpu::BufferBindingType::Storage { read_only: true },
                        Access::Write => wgpu::BufferBindingType::Storage { read_only: false },
                    },
                    has_dynamic_offset: false,
                    min_binding_size: None,
                },
                count: None,
            })
            .collect();
        let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label: Some(&label),
            entries: &entries,
        });
        let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(&label),
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(&label),
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions {
                // Kernels write workgroup memory before they read it. Not even when checked: on GL zeroing is one literal
                // of the whole array, and Mesa takes minutes and 4 GB to compile it.
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache: cache.as_ref(),
        });
        match said(scopes) {
            Some(error) => {
                let message = linked.explain(&error.to_string());
                Err(Error::Shader { kernel: variant.kernel.name(), message })
            }
            None => {
                Ok(Self { label, bindings: bindings.into_iter().map(|b| b.0).collect(), layout, pipeline })
            }
        }
    }
}

/// Binds those of the numbered `resources` that the kernel uses.
pub(crate) fn bind(
    device: &wgpu::Device,
    pipeline: &Pipeline,
    resources: &[(u32, wgpu::BindingResource<'_>)],
) -> wgpu::BindGroup {
    let entries: Vec<_> = resources
        .iter()
        .filter(|(number, _)| pipeline.bindings.contains(number))
        .map(|(number, resource)| wgpu::BindGroupEntry { binding: *number, resource: resource.clone() })
        .collect();
    device.create_bind_group(&wgpu::BindGroupDescriptor {
        label: Some(&pipeline.label),
        layout: &pipeline.layout,
        entries: &entries,
    })
}
