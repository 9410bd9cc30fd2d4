// The work list of `prefill` and `decode`, whose workgroups take an (item, KV head) each.

struct Work {
    params: Params,
    items: array<WorkItem>,
}

@group(0) @binding(0) var<storage, read> work: Work;
