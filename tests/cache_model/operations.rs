//! What happens to a cache.

use gqa::wgpu;
use safetensors::SafeTensors;

use super::driver::{Driver, KINDS, LONGEST_STEP, MAX_NEW, MAX_QUERIES, Part, text};
use super::model::{Refusal, Saved};
use super::numbers::stored;

type Operation = fn(&mut Driver) -> Result<(), String>;

impl Driver {
    /// One random operation, by name.
    pub(crate) fn act(&mut self) -> Result<&'static str, String> {
        if self.model.open.is_empty() {
            return self.open().map(|()| "open");
        }
        if std::mem::take(&mut self.must_close) {
            return self.close().map(|()| "close");
        }
        let (name, act): (_, Operation) = match self.rng.u32(..1000) {
            0 => ("clear", Self::clear),
            1..60 => ("open", Self::open),
            60..160 => ("fork", Self::fork),
            160..190 => ("close", Self::close),
            190..250 => ("truncate", Self::truncate),
            250..280 => ("evict", Self::evict),
            280..310 => ("save", Self::save_any),
            310..350 => ("load", Self::load),
            350..370 => ("defragment", Self::defragment),
            370..410 => ("reserve", Self::reserve),
            410..530 => ("attend", Self::attend),
            _ => ("grow", Self::grow),
        };
        act(self).map_err(|error| format!("{name}: {error}"))?;
        Ok(name)
    }

    /// All that is owed, and the contents of all that is open.
    pub(crate) fn finish(&mut self) -> Result<(), String> {
        self.settle()?;
        for nth in 0..self.ids.len() {
            self.save(nth)?;
        }
        while !self.ids.is_empty() {
            self.close()?;
        }
        match self.cache.is_empty() && self.cache.usage().pools.iter().all(|pool| pool.used == 0) {
            true => Ok(()),
            false => Err(format!("all is closed, but: {}", self.cache.usage())),
        }
    }

    fn any(&mut self) -> usize {
        self.rng.usize(..self.ids.len())
    }

    /// Some sequences, each once.
    fn some(&mut self, most: usize) -> Vec<usize> {
        let mut all: Vec<_> = (0..self.ids.len()).collect();
        self.rng.shuffle(&mut all);
        all.truncate(self.rng.usize(1..=most));
        all
    }

    fn clear(&mut self) -> Result<(), String> {
        self.cache.clear();
        self.model.clear();
        Ok(())
    }

    fn open(&mut self) -> Result<(), String> {
        let (expected, found) = (self.model.opens(), self.cache.open());
        if let Some(id) = self.agree(found, expected)? {
            self.model.open();
            self.ids.push(id);
        }
        Ok(())
    }

    fn fork(&mut self) -> Result<(), String> {
        // Rather long ones: what they share is worth reading once.
        let nth = [(); 3].map(|()| self.any()).into_iter().max_by_key(|nth| self.model.open[*nth].len());
        let nth = nth.unwrap_or(0);
        let (expected, found) = (self.model.opens(), self.cache.fork(self.ids[nth]));
        if let Some(id) = self.agree(found, expected)? {
            self.model.fork(nth);
            self.ids.push(id);
        }
        Ok(())
    }

    fn close(&mut self) -> Result<(), String> {
        let nth = self.any();
        let id = self.ids.swap_remove(nth);
        self.model.open.swap_remove(nth);
        self.cache.close(id).map_err(text)?;
        match self.cache.len(id) {
            Err(gqa::Error::StaleSequence { .. }) => Ok(()),
            other => Err(format!("a closed sequence answers {other:?}")),
        }
    }

    fn truncate(&mut self) -> Result<(), String> {
        let nth = self.any();
        let len = self.model.open[nth].len();
        let len = match self.rng.u32(..6) {
            0 => self.rng.u32(..=len + 1),
            _ => len.saturating_sub(self.rng.u32(..10)),
        };
        let found = self.cache.truncate(self.ids[nth], len);
        let expected = self.model.truncate(nth, len);
        self.agree(found, expected).map(drop)
    }

    fn evict(&mut self) -> Result<(), String> {
        let nth = self.any();
        let tokens = match self.rng.u32(..8) {
            0 => self.model.open[nth].len() + self.rng.u32(..2),
            _ => self.rng.u32(..=self.model.open[nth].len()),
        };
        let found = self.cache.evict(self.ids[nth], tokens);
        let expected = self.model.evict(nth, tokens);
        self.agree(found, expected).map(drop)
    }

    fn defragment(&mut self) -> Result<(), String> {
        let mut encoder = self.encoder();
        self.counts.moved += self.cache.defragment(&mut encoder).map_err(text)?;
        let again = self.cache.defragment(&mut encoder).map_err(text)?;
        self.submit(encoder);
        if again > 0 { Err(format!("{again} pages moved once more")) } else { Ok(()) }
    }

    /// Takes pages without using them yet.
    fn reserve(&mut self) -> Result<(), String> {
        let some = self.some(3);
        let growth: Vec<_> = some.iter().map(|nth| (*nth, self.rng.u32(..=LONGEST_STEP))).collect();
        let by_id: Vec<_> = growth.iter().map(|(nth, tokens)| (self.ids[*nth], *tokens)).collect();
        let mut encoder = self.encoder();
        let found = self.cache.reserve(&mut encoder, &by_id);
        let next = self.model.reserved(&growth);
        if self.agree(found, next.as_ref().map(drop).map_err(|refusal| *refusal))?.is_some() {
            self.model = next.map_err(|refusal| format!("{refusal:?}"))?;
        }
        self.submit(encoder);
        Ok(())
    }

    /// New tokens for some sequences, in reserved pages or others, and now and then queries.
    fn grow(&mut self) -> Result<(), String> {
        let attends = self.rng.u32(..4) == 0;
        let (mut parts, mut growth, mut advances) = (Vec::new(), Vec::new(), Vec::new());
        let mut room = MAX_NEW;
        for nth in self.some(4) {
            let new_len = match self.rng.u32(..16) {
                0..7 => 1,
                7..11 => self.rng.u32(..6),
                11..15 => self.rng.u32(..=LONGEST_STEP),
                _ => self.rng.u32(..=MAX_NEW),
            };
            let new_len = new_len.min(room);
            room -= new_len;
            let s = &self.model.open[nth];
            match new_len > 0 && new_len <= s.reserved - s.len() && self.rng.bool() {
                true => advances.push((nth, new_len)),
                false => growth.push((nth, new_len)),
            }
            let most = if attends { new_len.min(MAX_QUERIES / 4) } else { 0 };
            let q_len = if most > 0 { self.rng.u32(1..=most) } else { 0 };
            parts.push(Part { nth, new_len, q_len });
        }
        let by_id: Vec<_> = growth.iter().map(|(nth, tokens)| (self.ids[*nth], *tokens)).collect();
        let mut encoder = self.encoder();
        let found = self.cache.extend(&mut encoder, &by_id);
        let next = self.model.reserved(&growth);
        if self.agree(found, next.as_ref().map(drop).map_err(|refusal| *refusal))?.is_none() {
            // Nothing may have been recorded.
            self.submit(encoder);
            return Ok(());
        }
        self.model = next.map_err(|refusal| format!("{refusal:?}"))?;
        for (nth, tokens) in &advances {
            self.cache.advance(self.ids[*nth], *tokens).map_err(text)?;
        }
        for part in &parts {
            let first = self.next_token;
            self.next_token += part.new_len;
            self.model.open[part.nth].tokens.extend(first..self.next_token);
        }
        self.forward(encoder, &parts)
    }

    /// Queries that are old tokens: few of many sequences, or many of one, which windows may have forgotten.
    fn attend(&mut self) -> Result<(), String> {
        let (most, queries) = match self.rng.u32(..8) {
            // Not more: an old text lies in many pieces, each of which has states of its own.
            0 => (1, MAX_QUERIES / 3),
            1..5 => (10, 1),
            _ => (9, 3),
        };
        let mut parts = Vec::new();
        for nth in self.some(most) {
            let len = self.model.open[nth].len();
            let q_len = self.rng.u32(1..=queries).min(len);
            parts.push(Part { nth, new_len: 0, q_len });
        }
        self.forward(self.encoder(), &parts)
    }

    fn save_any(&mut self) -> Result<(), String> {
        let nth = self.any();
        let file = self.save(nth)?;
        if self.files.len() == 6 {
            self.files.swap_remove(self.rng.usize(..6));
        }
        self.files.push(file);
        Ok(())
    }

    /// Saves a sequence, and holds every byte against the model.
    fn save(&mut self, nth: usize) -> Result<(Saved, Vec<u8>), String> {
        let mut encoder = self.encoder();
        let snapshot = self.cache.snapshot(&mut encoder, self.ids[nth]).map_err(text)?;
        self.submit(encoder);
        snapshot.buffer().map_async(wgpu::MapMode::Read, .., |_| {});
        self.gpu.device.poll(wgpu::PollType::wait_indefinitely()).map_err(|e| e.to_string())?;
        let mapped = snapshot.buffer().get_mapped_range(..).map_err(|e| e.to_string())?;
        let bytes = snapshot.to_bytes(&mapped).map_err(text)?;
        let saved = self.model.save(nth);
        let file = SafeTensors::deserialize(&bytes).map_err(|e| e.to_string())?;
        for (layer, kind) in KINDS.into_iter().enumerate() {
            for (side, name) in ["k", "v"].into_iter().enumerate() {
                let tensor = file.tensor(&format!("layers.{layer}.{name}")).map_err(|e| e.to_string())?;
                let kept = &saved.tokens[saved.kept[kind] as usize..];
                let spec = self.spec(layer);
                let expected: Vec<u8> =
                    kept.iter().flat_map(|token| stored(spec, side, *token, layer)).collect();
                if tensor.data() != expected {
                    let (found, needed) = (tensor.data().len(), expected.len());
                    return Err(format!(
                        "{name} of layer {layer} is not what it was ({found}, {needed} bytes)"
                    ));
                }
            }
        }
        Ok((saved, bytes))
    }

    fn load(&mut self) -> Result<(), String> {
        if self.files.is_empty() {
            return Ok(());
        }
        let (saved, bytes) = &self.files[self.rng.usize(..self.files.len())];
        let next = self.model.loaded(saved);
        let found = self.cache.restore(&self.gpu.queue, bytes);
        if let Some(id) = self.agree(found, next.as_ref().map(drop).map_err(|refusal| *refusal))? {
            self.model = next.map_err(|refusal: Refusal| format!("{refusal:?}"))?;
            self.ids.push(id);
        }
        Ok(())
    }
}
