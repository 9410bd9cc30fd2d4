//! Work lists on their way to the GPU: one image of a buffer with a region for each list, uploaded at once.

use crate::caps::Caps;
use crate::error::Error;

/// A place in the work buffer: bytes.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Region {
    pub(crate) offset: u64,
    pub(crate) size: u64,
}

/// A work list's place in the step's buffer, and the dispatch that takes it.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Launch {
    pub(crate) region: Region,
    pub(crate) grid: [u32; 3],
    /// Where its arguments are, if the GPU makes them.
    pub(crate) arguments: Option<u64>,
}

impl Launch {
    /// The list in `buffer`, to be bound.
    pub(crate) fn list<'a>(&self, buffer: &'a wgpu::Buffer) -> wgpu::BindingResource<'a> {
        let Region { offset, size } = self.region;
        let size = std::num::NonZeroU64::new(size);
        wgpu::BindingResource::Buffer(wgpu::BufferBinding { buffer, offset, size })
    }

    /// The dispatch, where there is work.
    pub(crate) fn get(&self) -> Option<[u32; 3]> {
        (self.grid[0] > 0).then_some(self.grid)
    }
}

/// The work buffer as it will be. Regions stay where they are from step to step while lists fit them, so bindings stay good.
#[derive(Debug, Default)]
pub(crate) struct Image {
    bytes: Vec<u8>,
    regions: Vec<Region>,
    /// The region that the next list goes to.
    next: usize,
    /// Whether a region is not where bindings have it.
    moved: bool,
}

impl Image {
    /// Begins anew with the first region.
    pub(crate) fn clear(&mut self) {
        self.next = 0;
    }

    /// Bytes of the buffer.
    pub(crate) fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// All of it, as it is to be uploaded.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Whether bindings of the regions as they were are no longer good.
    pub(crate) fn moved(&self) -> bool {
        self.moved
    }

    /// Bindings are made of the regions as they are from here on. Until then regions that a refused step has moved count as moved.
    pub(crate) fn settle(&mut self) {
        self.moved = false;
    }

    /// Writes a list's head and items into the next region, and says what dispatches it.
    pub(crate) fn launch<H: bytemuck::Pod, T: bytemuck::Pod>(
        &mut self,
        caps: &Caps,
        (head, items): (&H, &[T]),
        grid: [u32; 3],
    ) -> Result<Launch, Error> {
        let needed = if items.is_empty() { 0 } else { size_of::<H>() + size_of_val(items) };
        check(caps, needed as u64, grid)?;
        let before = self.next.checked_sub(1).and_then(|i| self.regions.get(i)).copied().unwrap_or_default();
        let offset = (before.offset + before.size).next_multiple_of(u64::from(caps.offset_alignment));
        let old = self.regions.get(self.next).copied().unwrap_or_default();
        let size = match needed as u64 {
            needed if needed <= old.size => old.size,
            needed => needed.next_power_of_two().min(caps.binding_size),
        };
        let region = Region { offset, size };
        if self.next == self.regions.len() {
            self.regions.push(Region::default());
        }
        self.moved |= region != old;
        self.regions[self.next] = region;
        self.next += 1;
        let end = (offset + size) as usize;
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        if items.is_empty() {
            return Ok(Launch { region, ..Launch::default() });
        }
        let (at, head) = (offset as usize, bytemuck::bytes_of(head));
        self.bytes[at..at + head.len()].copy_from_slice(head);
        self.bytes[at + head.len()..at + needed].copy_from_slice(bytemuck::cast_slice(items));
        Ok(Launch { region, grid, arguments: None })
    }

    /// Uploads all of it.
    pub(crate) fn write(&self, queue: &wgpu::Queue, buffer: &wgpu::Buffer) {
        if !self.bytes.is_empty() {
            queue.write_buffer(buffer, 0, &self.bytes);
        }
    }
}

fn check(caps: &Caps, needed: u64, grid: [u32; 3]) -> Result<(), Error> {
    let what = || "the work list of a step".to_owned();
    let hint = "split the batch, or leave Options::chunk to the plan";
    if needed > caps.binding_size {
        let (limit, found) = ("max_storage_buffer_binding_size", caps.binding_size);
        return Err(Error::Limit { what: what(), limit, needed, found, hint });
    }
    match grid.into_iter().find(|n| *n > caps.workgroups) {
        Some(needed) => {
            let limit = "max_compute_workgroups_per_dimension";
            let (needed, found) = (needed.into(), caps.workgroups.into());
            Err(Error::Limit { what: what(), limit, needed, found, hint })
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_that_a_refused_step_has_moved_stay_moved() {
        let caps = Caps::minimal();
        let mut image = Image::default();
        let launch = |image: &mut Image, items: usize, x: u32| {
            image.launch(&caps, (&0u32, &vec![0u32; items]), [x, 1, 1]).map(|launch| launch.region)
        };
        let first = launch(&mut image, 10, 1).unwrap();
        assert!(image.moved());
        image.settle();
        image.clear();
        assert_eq!(launch(&mut image, 9, 1), Ok(first));
        assert!(!image.moved());
        // A step whose second list is too much for the device.
        image.clear();
        let second = launch(&mut image, 1000, 1).unwrap();
        assert!(launch(&mut image, 1, u32::MAX).is_err());
        image.clear();
        assert_eq!(launch(&mut image, 9, 1), Ok(second));
        assert!(image.moved() && second != first);
    }
}
