//! Text to token ids and back, as the GGUF file says: byte-level BPE, and the chat template.

use candle_core::quantized::gguf_file::Value;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, PreTokenizerWrapper, SplitDelimiterBehavior};

use crate::weights::{Gguf, Result};

/// llama.cpp's rule for Llama 3 ("llama-bpe").
const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A tokenizer and the words around a conversation.
pub(crate) struct Tokenizer {
    inner: tokenizers::Tokenizer,
    template: Option<String>,
    /// Any of them ends an answer.
    pub(crate) ends: Vec<u32>,
    begin: Option<u32>,
}

impl Tokenizer {
    /// From the header of a file.
    pub(crate) fn new(gguf: &Gguf) -> Result<Self> {
        let model = gguf.text("tokenizer.ggml.model")?;
        if model != "gpt2" {
            return Err(format!(
                "the tokenizer is '{model}': this example has byte-level BPE ('gpt2'); use --prompt-ids and --print-ids"
            )
            .into());
        }
        let tokens = texts(gguf, "tokenizer.ggml.tokens")?;
        let vocabulary = tokens.iter().zip(0..).map(|(token, id)| (token.clone(), id)).collect::<Vocab>();
        let merges = texts(gguf, "tokenizer.ggml.merges")?
            .iter()
            .map(|merge| merge.split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned())))
            .collect::<Option<Vec<_>>>()
            .ok_or("a merge of the tokenizer is not two tokens")?;
        let pre = gguf.text("tokenizer.ggml.pre").unwrap_or("default");
        let llama_3 = matches!(pre, "llama-bpe" | "llama3");
        // Llama 3 takes whole words of the vocabulary as they are, and begins every text, unless the file says otherwise.
        let bpe = BPE::builder().vocab_and_merges(vocabulary, merges).ignore_merges(llama_3).build()?;
        let mut inner = tokenizers::Tokenizer::new(bpe);
        let bytes = |use_regex| PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, use_regex));
        let before = match pre {
            "smollm" => vec![PreTokenizerWrapper::Digits(Digits::new(true)), bytes(true)],
            _ if llama_3 => {
                let pattern = SplitPattern::Regex(LLAMA_3.to_owned());
                let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?;
                vec![PreTokenizerWrapper::Split(split), bytes(false)]
            }
            "default" | "gpt-2" => vec![bytes(true)],
            other => {
                return Err(format!(
                    "the tokenizer splits text as '{other}', which this example does not know"
                )
                .into());
            }
        };
        inner.with_pre_tokenizer(Some(Sequence::new(before)));
        inner.with_decoder(Some(ByteLevel::default()));
        let special: Vec<_> = kinds(gguf)
            .zip(&tokens)
            // 3 marks control tokens, 4 those that users defined.
            .filter(|(kind, _)| matches!(kind, 3 | 4))
            .map(|(_, token)| AddedToken::from(token.clone(), true))
            .collect();
        inner.add_special_tokens(special)?;
        let begins = match gguf.value("tokenizer.ggml.add_bos_token") {
            Some(value) => matches!(value, Value::Bool(true)),
            None => llama_3,
        };
        let begin = begins.then(|| gguf.number("tokenizer.ggml.bos_token_id")).transpose()?;
        Ok(Self {
            inner,
            template: gguf.text("tokenizer.chat_template").ok().map(str::to_owned),
            ends: ends(gguf),
            begin: begin.map(|id| id as u32),
        })
    }

    /// Ids of `text`, in which special tokens may stand.
    pub(crate) fn ids(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, false)?;
        Ok(self.begin.into_iter().chain(encoding.get_ids().iter().copied()).collect())
    }

    /// Text of `ids`, special tokens included.
    pub(crate) fn text(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, false)
    }

    /// A user's question as the model's template wants it, up to where the answer begins.
    pub(crate) fn chat(&self, question: &str) -> Result<String> {
        let Some(template) = &self.template else { return Ok(question.to_owned()) };
        let mut environment = minijinja::Environment::new();
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_template("chat", template)?;
        let message = minijinja::context! { role => "user", content => question };
        let context = minijinja::context! {
            messages => vec![message], add_generation_prompt => true, bos_token => "", eos_token => self.text(&self.ends[..self.ends.len().min(1)])?
        };
        Ok(environment.get_template("chat")?.render(context)?)
    }
}

fn texts(gguf: &Gguf, key: &str) -> Result<Vec<String>> {
    let Some(Value::Array(values)) = gguf.value(key) else {
        return Err(format!("the file lacks the list '{key}'").into());
    };
    values.iter().map(|value| Ok(value.to_string()?.clone())).collect()
}

/// Kinds of the tokens, 1 where the file has none.
fn kinds(gguf: &Gguf) -> impl Iterator<Item = i32> {
    let kinds = match gguf.value("tokenizer.ggml.token_type") {
        Some(Value::Array(values)) => values.iter().map(|value| value.to_i32().unwrap_or(1)).collect(),
        _ => Vec::new(),
    };
    kinds.into_iter().chain(std::iter::repeat(1))
}

/// Tokens that end an answer: of the text, of a turn, of a message, as far as the file names them.
pub(crate) fn ends(gguf: &Gguf) -> Vec<u32> {
    let keys = ["eos", "eot", "eom"].map(|of| format!("tokenizer.ggml.{of}_token_id"));
    keys.iter().filter_map(|key| gguf.number(key).ok()).map(|id| id as u32).collect()
}
